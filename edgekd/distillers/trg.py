"""Token relationship graphs, Zhang et al. 2023 (arXiv:2306.12442), inspired by: from notes on the paper, with
hyper-parameters of our own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.adapters import seeded, width_adapter
from edgekd.distillers import Context, Count, Distiller, Needs, NonNegative, Positive, Setting
from edgekd.errors import UsageError, unknown_name
from edgekd.maps import same_size, tapped
from edgekd.nets import Batch, Outputs
from edgekd.tokens import paired_blocks, positions, same_length

_TAPS = ("features", "tokens")


def inner_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (softmax(F F^T / sqrt(D))_S - softmax(F F^T / sqrt(D))_T)^2`` of (N, L, D) tokens, relations
    among the tokens of one image; widths may differ."""
    ours, theirs = (
        torch.softmax(tokens @ tokens.transpose(1, 2) / tokens.shape[2] ** 0.5, 2)
        for tokens in (student, teacher.detach())
    )
    return F.mse_loss(ours, theirs)


def local_loss(student: Tensor, teacher: Tensor, neighbours: int, sigma: float) -> Tensor:
    """``mean_i KL(softmax_j A_T,ij || softmax_j A_S,ij)`` of (M, D) tokens; widths may differ.

    ``A_ij = exp(-||T_i - T_j||^2 / (2 sigma))`` for the `neighbours` + 1 nearest j of i, itself among them,
    else 0; zeros take part in the softmax.
    """
    graphs = [_graph(tokens, neighbours, sigma).log_softmax(1) for tokens in (student, teacher.detach())]
    return F.kl_div(graphs[0], graphs[1], reduction="batchmean", log_target=True)


def _graph(tokens: Tensor, neighbours: int, sigma: float) -> Tensor:
    squares = tokens.square().sum(1)
    distance = (squares[:, None] + squares - 2 * tokens @ tokens.T).clamp(min=0)
    near = distance.topk(min(neighbours + 1, len(tokens)), largest=False).indices
    return torch.zeros_like(distance).scatter(1, near, torch.exp(-distance.gather(1, near) / (2 * sigma)))


def global_loss(student: Tensor, teacher: Tensor, temperature: Tensor | float) -> Tensor:
    """``-mean_i log softmax_j(cos(student_i, teacher_j) / temperature)[i]`` of (M, D) tokens of one width."""
    cosines = F.normalize(student, dim=1) @ F.normalize(teacher.detach(), dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(cosines), device=cosines.device))


class Trg(Distiller):
    """``inner * inner_loss + local * local_loss + contrast * global_loss`` on the last block's ``tokens``, or
    the positions of the last map (``on = "features"``). The logit term of the paper is ``kd+trg``.

    Graph and contrast see at most `sampled` tokens a batch, drawn anew each step, as many of each image; the
    graph is made of tokens of length 1, with sigma 1. The temperature of the contrast falls geometrically
    from 1 to `temperature`. Weights are ours, so that each term is of the order of a cross-entropy.
    Batch-coupled: neighbours and contrasts are sought in the whole batch. The contrast is not zero at
    identity.
    """

    needs = Needs(teacher=("features",), student=("features",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self,
        on: str = "features",
        inner: NonNegative = 100.0,
        local: NonNegative = 100.0,
        contrast: NonNegative = 0.2,
        neighbours: Count = 8,
        sampled: Count = 512,
        temperature: Positive = 0.1,
    ) -> None:
        super().__init__()
        if on not in _TAPS:
            raise UsageError(*unknown_name("tap of method trg", on, _TAPS))
        self.on, self.needs = on, Needs(teacher=(on,), student=(on,))
        self.inner, self.local, self.contrast = inner, local, contrast
        self.neighbours, self.sampled, self.temperature = neighbours, sampled, temperature

    def _tokens(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """(N, L, D) of both, one N and L."""
        if self.on == "tokens":
            return same_length(*paired_blocks(student.tokens, teacher.tokens)[-1])
        ours, theirs = same_size(tapped(student, "features"), tapped(teacher, "features"))
        return positions(ours), positions(theirs)

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.adapter = width_adapter(*self._tokens(student, teacher))

    def _sample(self, tokens: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, Tensor]:
        """(M, D) of both, M at most `sampled` or, where that is more, the number of images."""
        images, length = tokens[0].shape[:2]
        count = min(length, max(1, self.sampled // images))
        drawn = torch.rand(images, length, generator=context.generator, device=tokens[0].device)
        picked = drawn.topk(count).indices[:, :, None]
        ours, theirs = (t.gather(1, picked.expand(-1, -1, t.shape[2])).flatten(0, 1) for t in tokens)
        return ours, theirs

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        tokens = self._tokens(student, teacher)
        ours, theirs = self._sample(tokens, context)
        near = local_loss(F.normalize(ours, dim=1), F.normalize(theirs, dim=1), self.neighbours, sigma=1.0)
        share = torch.clamp(context.step / context.steps, max=1.0)
        across = global_loss(self.adapter(ours), theirs, self.temperature**share)
        return self.inner * inner_loss(*tokens) + self.local * near + self.contrast * across
