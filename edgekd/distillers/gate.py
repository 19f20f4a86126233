"""Transfer between any two models by a data partition, Roth et al. 2024 (arXiv:2310.17653, eq. 4)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, Positive
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs, softened_kl, wide
from edgekd.taps import Tapped
from edgekd.wraps import only_wrap


def surer(teacher_logits: Tensor, frozen_logits: Tensor, labels: Tensor | None) -> Tensor:
    """(N, classes) logits, each row from the model that is surer; of the frozen copy where they tie.

    Sure is the probability of the label, or of the most probable class where `labels` is None.
    """
    theirs, ours = (wide(logits).detach() for logits in (teacher_logits, frozen_logits))
    log_p = [F.log_softmax(logits, 1) for logits in (theirs, ours)]
    if labels is None:
        taught, kept = (p.max(1, keepdim=True).values for p in log_p)
    else:
        taught, kept = (p.gather(1, labels[:, None]) for p in log_p)
    return torch.where(taught > kept, theirs, ours)


class _BesideFrozen(nn.Module):
    """A student and its frozen copy, whose logits are `Outputs.peer`."""

    def __init__(self, student: Tapped, frozen: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.frozen = frozen.eval().requires_grad_(requires_grad=False)

    def forward(self, inputs: Tensor) -> Outputs:
        with torch.no_grad():
            frozen = self.frozen(inputs)
        outputs: Outputs = self.student(inputs)
        return replace(outputs, peer=Outputs(frozen))

    def train(self, mode: bool = True) -> _BesideFrozen:
        super().train(mode)
        self.frozen.eval()
        return self

    def deploy(self) -> nn.Module:
        """The student without its copy."""
        return self.student.deploy()


class Gate(Distiller):
    """``T^2 * mean_n KL(softmax(m / T) || softmax(student / T))``, m the teacher's logits or those of a copy
    of the student, frozen at the start: by sample the surer of the two. What the student knows better than
    the teacher is kept: for teachers that are no stronger, and for training a quantized student.

    Zero where the student equals its copy and the teacher is nowhere surer. `supervised` False compares the
    largest probabilities and reads no labels. The copy's logits travel in `Outputs.peer`. As the target is
    replaced for all terms, ``gate+dkd`` gates DKD too; with weight 0 here DKD is alone. Weight 1 and no
    cross-entropy; temperature 1 is ours, as is that ties go to the copy.
    """

    needs = Needs(labels=True)
    weight = 1.0
    hard_weight = 0.0

    def __init__(self, temperature: Positive = 1.0, supervised: bool = True) -> None:
        super().__init__()
        self.temperature, self.supervised = temperature, supervised
        if not supervised:
            self.needs = Needs()

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped = only_wrap(student, "gate")
        return _BesideFrozen(tapped, copy.deepcopy(tapped).deploy())

    def target(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Outputs:
        if student.peer is None:
            raise UsageError("method 'gate': the student has no frozen copy", "train what Gate.wrap returns")
        labels = batch.labels if self.supervised else None
        return replace(teacher, logits=surer(teacher.logits, student.peer.logits, labels))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return softened_kl(student.logits, teacher.logits, self.temperature).mean()
