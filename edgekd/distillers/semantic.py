"""DisWOT's semantic similarity as a loss, Dong et al. 2023 (arXiv:2303.15678, eq. 4 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.adapters import seeded, width_adapter
from edgekd.distillers import Context, Distiller, Needs, Setting
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs, wide


def classifier_gradient(logits: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy by a linear classifier's weight, (classes, D), in closed form:
    ``(softmax(z) - onehot(y))^T E / N`` of (N, classes) logits and (N, D) embeddings."""
    hot = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    residual = torch.softmax(wide(logits), 1) - hot.to(wide(logits).dtype)
    return residual.T @ embedding / len(logits)


def semantic_loss(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """``sum_c ||E_c,T - E_c,S||^2 / (C D)``, ``E_c = rownorm(w_c w_c^T)``, of (C, D) gradients.

    A row of ``w w^T`` is a multiple of ``w``: normalised, row r is ``sign(w_r) w / ||w||``. The matrices are
    therefore never made: ``||E_T - E_S||^2 = n_T + n_S - 2 (sign w_T . sign w_S) cos(w_T, w_S)``, n the
    number of entries that are not zero.
    """
    student, teacher = (F.normalize(w, dim=1) for w in (student_gradient, teacher_gradient.detach()))
    signs = [w.sign() for w in (student, teacher)]
    filled = sum(sign.square().sum(1) for sign in signs)
    agreement = (signs[0] * signs[1]).sum(1) * (student * teacher).sum(1)
    return (filled - 2 * agreement).sum() / student.numel()


class Semantic(Distiller):
    """Matches the gradients that both classifiers would get from this batch and its labels.

    Needs equal widths; a linear map, trained along, brings the student's embedding to the teacher's width.
    The paper does not state the weight; 2.5 is the one in use for the same formula on feature maps (`ickd`).
    """

    needs = Needs(teacher=("logits", "embedding"), student=("logits", "embedding"), labels=True)
    weight = 2.5
    hard_weight = 1.0

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.adapter = width_adapter(tapped(student, "embedding"), tapped(teacher, "embedding"))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours = classifier_gradient(student.logits, self.adapter(tapped(student, "embedding")), batch.labels)
        with torch.no_grad():
            theirs = classifier_gradient(teacher.logits, tapped(teacher, "embedding"), batch.labels)
        return semantic_loss(ours, theirs)
