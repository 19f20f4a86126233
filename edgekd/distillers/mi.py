"""MI-alpha, the intermediate loss of Distiller, He et al. 2021 (arXiv:2109.11105, section 3), with the
interpolated bound of Poole et al. 2019 (arXiv:1905.06922, section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Count, Distiller, Needs, Setting
from edgekd.errors import UsageError, unknown_name
from edgekd.maps import paired, tapped
from edgekd.nets import Batch, Outputs
from edgekd.tokens import paired_blocks

_TAPS = ("embedding", "stages", "tokens")


def _log_mean_of_others(scores: Tensor) -> Tensor:
    """``m_ij = log (1 / (N - 1)) sum_{k != j} exp(S_ik)`` from running sums of both ends: no difference of
    two large numbers, whatever the scores."""
    before = torch.logcumsumexp(scores, 1)[:, :-1]
    after = torch.logcumsumexp(scores.flip(1), 1).flip(1)[:, 1:]
    inner = torch.logaddexp(before[:, :-1], after[:, 1:])
    return torch.cat([after[:, :1], inner, before[:, -1:]], 1) - math.log(scores.shape[1] - 1)


def mi_bound(scores: Tensor, log_baseline: Tensor, alpha_logit: float) -> Tensor:
    """``I = 1 + mean_{i != j} (S_ii - B_ij) - mean_{i != j} exp(S_ij - B_ii)`` in nats, (N, N) scores and
    (N,) log-baselines, ``B_ij = log(a exp(m_ij) + (1 - a) exp(b_i))``, ``a = sigmoid(alpha_logit)``.

    A large `alpha_logit` tends to InfoNCE, a small one to the bound with the baseline alone.
    """
    log_a, log_rest = (-math.log1p(math.exp(-x)) for x in (alpha_logit, -alpha_logit))
    mixed = torch.logaddexp(log_a + _log_mean_of_others(scores), log_rest + log_baseline[:, None])
    pairs = scores.numel() - len(scores)
    joint = scores.diag().mean() - (mixed.sum() - mixed.diag().sum()) / pairs
    same = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    apart = (scores - mixed.diag()[:, None]).masked_fill(same, -math.inf)
    return 1 + joint - torch.exp(torch.logsumexp(apart, (0, 1)) - math.log(pairs))


class Critic(nn.Module):
    """Bound for one pair of (N, D) states: scores ``g(s_i) . h(t_j)``, a baseline on the teacher's state."""

    def __init__(self, student_width: int, teacher_width: int, hidden: int, width: int) -> None:
        super().__init__()
        self.student = _mlp(student_width, hidden, width)
        self.teacher = _mlp(teacher_width, hidden, width)
        self.baseline = _mlp(teacher_width, hidden, 1)

    def forward(self, student: Tensor, teacher: Tensor, alpha_logit: float) -> Tensor:
        scores = self.student(student) @ self.teacher(teacher).T
        return mi_bound(scores, self.baseline(teacher)[:, 0], alpha_logit)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Mi(Distiller):
    """The negative bound, summed over the pairs of `on`: the ``embedding``, the ``stages`` (each pooled to
    its channel means) or the ``tokens`` (each block pooled to its mean token).

    The critics are trained along. The published command line gives alpha as the logit 0.9, which mixes at
    0.71. The authors put it with weight 1 beside a KD term and no labels: that is ``kd+mi`` with ``kd.weight
    = 1`` and ``hard_weight = 0`` in both. Here labels weigh 1, for the bound does not reach the classifier.
    Not zero at identity: its least value is minus the information. Batch-coupled: the bound is at most
    log N; it needs batches of two or more.
    """

    weight = 1.0
    hard_weight = 1.0
    needs = Needs(teacher=("embedding",), student=("embedding",))

    def __init__(
        self, on: str = "embedding", alpha_logit: float = 0.9, hidden: Count = 128, width: Count = 64
    ) -> None:
        super().__init__()
        if on not in _TAPS:
            raise UsageError(*unknown_name("tap of method mi", on, _TAPS))
        self.on, self.alpha_logit, self.hidden, self.width = on, alpha_logit, hidden, width
        self.needs = Needs(teacher=(on,), student=(on,))

    def _states(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        if self.on == "embedding":
            return [(tapped(student, "embedding"), tapped(teacher, "embedding").detach())]
        if self.on == "stages":
            pairs = paired(student.stages, teacher.stages, "stages")
            return [(s.mean((2, 3)), t.mean((2, 3))) for s, t in pairs]
        return [(s.mean(1), t.mean(1)) for s, t in paired_blocks(student.tokens, teacher.tokens)]

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.critics = nn.ModuleList(
                Critic(ours.shape[1], theirs.shape[1], self.hidden, self.width)
                for ours, theirs in self._states(student, teacher)
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        states = self._states(student, teacher)
        bounds = [critic(*pair, self.alpha_logit) for critic, pair in zip(self.critics, states, strict=True)]
        return -torch.stack(bounds).sum()
