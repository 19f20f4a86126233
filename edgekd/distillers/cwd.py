"""Channel-wise distillation, Shu et al. 2021 (arXiv:2011.13256, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.adapters import channel_adapter, seeded
from edgekd.distillers import Context, Distiller, Needs, Positive, Setting
from edgekd.maps import same_size, tapped
from edgekd.nets import Batch, Outputs


def cwd_loss(student_map: Tensor, teacher_map: Tensor, temperature: float) -> Tensor:
    """``T^2 / (N C) * sum KL(softmax(teacher / T) || softmax(student / T))``, softmax over the positions of
    each channel of (N, C, H, W) maps. Zero at identity; blind to a constant added to a channel."""
    student, teacher = (
        F.log_softmax(m.flatten(2).flatten(0, 1) / temperature, 1)
        for m in (student_map, teacher_map.detach())
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Cwd(Distiller):
    """The last map, temperature 4, weight 50 beside the labels; 3 where maps are dense logits. The authors'
    scripts leave the weight to the command line, and these values have not been checked."""

    needs = Needs(teacher=("features",), student=("features",))
    weight = 50.0
    hard_weight = 1.0

    def __init__(self, temperature: Positive = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.adapter = channel_adapter(tapped(student, "features"), tapped(teacher, "features"))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = same_size(tapped(student, "features"), tapped(teacher, "features"))
        return cwd_loss(self.adapter(ours), theirs, self.temperature)
