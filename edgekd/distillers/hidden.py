"""Hidden states of transformer blocks: inspired by ERNIE-Tiny (arXiv:2106.02241), of which only the abstract
was at hand, in the form known from TinyBERT, Jiao et al. 2020 (arXiv:1909.10351, eq. 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.adapters import seeded, width_adapter
from edgekd.distillers import Context, Distiller, Needs, Setting
from edgekd.nets import Batch, Outputs
from edgekd.tokens import paired_blocks, same_length


class Hidden(Distiller):
    """``sum_i mean (H_S,i W - H_T,ik)^2`` over the blocks i of the student, k blocks of the teacher to each.

    One W for all blocks, and only there where widths differ. The attention part of those methods is left
    out: attention scores are not tapped. Weight 1 is ours.
    """

    needs = Needs(teacher=("tokens",), student=("tokens",))
    weight = 1.0
    hard_weight = 1.0

    def _pairs(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        return [same_length(*pair) for pair in paired_blocks(student.tokens, teacher.tokens)]

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.adapter = width_adapter(*self._pairs(student, teacher)[-1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = self._pairs(student, teacher)
        return torch.stack([F.mse_loss(self.adapter(ours), theirs) for ours, theirs in pairs]).sum()
