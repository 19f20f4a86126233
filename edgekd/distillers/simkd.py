"""SimKD, Chen et al. 2022 (arXiv:2203.14001; ``SimKD`` of the authors' ``models/util.py``): the student's map
is projected into the teacher's, and the teacher's own classifier reads it, at inference too."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Count, Distiller, Needs
from edgekd.errors import UnsupportedModelError
from edgekd.layout import Layout
from edgekd.nets import Batch, Outputs, wide
from edgekd.taps import Tapped
from edgekd.wraps import classifier_of, frozen, only_wrap


class Projector(nn.Sequential):
    """A bottleneck of 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU, on a map (N, C, H, W)
    that is averaged over squares of `pool` pixels first."""

    def __init__(self, width_in: int, width_out: int, factor: int, pool: int) -> None:
        middle = width_out // factor
        layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
        for before, after, kernel in (
            (width_in, middle, 1),
            (middle, middle, 3),
            (middle, width_out, 1),
        ):
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers)


def simkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """``mean (projected - teacher)^2`` of maps (N, C, H, W); a teacher's map of another size is pooled."""
    target = F.adaptive_avg_pool2d(wide(teacher).detach(), (projected.shape[2], projected.shape[3]))
    return F.mse_loss(wide(projected), target)


class SimKd(Distiller):
    """Weight 1, no labels, bottleneck factor 2. What is exported is the student, the projector and the
    teacher's frozen classifier; the student's own classifier is gone.

    A student's map that is larger by a whole factor is pooled before the projector, as the authors do; by
    another factor the teacher's is brought to its size. The student must end in a global pooling.
    """

    needs = Needs(teacher=("features",), student=("features", "embedding"), classifier=True)
    weight = 1.0
    hard_weight = 0.0

    def __init__(self, factor: Count = 2) -> None:
        super().__init__()
        self.factor = factor

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped = only_wrap(student, "simkd", head=True)
        reused = frozen(classifier_of(teacher, "simkd"))
        assert isinstance(teacher, Tapped)  # or it had shown no classifier
        own = tapped.model.get_submodule(str(tapped.layout.classifier))
        ours, theirs = tapped.layout.shapes[-1], teacher.layout.shapes[-1]
        _refuse_unpooled("student", ours, own)
        _refuse_unpooled("teacher", theirs, reused)
        shrink = ours[1] // theirs[1]
        pool = shrink if (theirs[1] * shrink, theirs[2] * shrink) == ours[1:] else 1
        projector = Projector(ours[0], theirs[0], self.factor, pool)
        last = tapped.layout.stages[-1]
        if "@" in last:
            raise UnsupportedModelError(
                f"method 'simkd': '{last}' makes the student's last map, a module that runs several times",
                "give the last stage a module of its own",
            )
        new = {
            last: nn.Sequential(tapped.model.get_submodule(last), projector.to(outputs.logits.device)),
            str(tapped.layout.classifier): reused.to(outputs.logits.device),
        }
        return tapped.changed(
            _inside(tapped.layout, last, (theirs[0], ours[1] // pool, ours[2] // pool)), new
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        assert student.features is not None
        assert teacher.features is not None
        return simkd_loss(student.features, teacher.features)


def _refuse_unpooled(owner: str, shape: tuple[int, int, int], classifier: nn.Module) -> None:
    if shape[0] != classifier.in_features:
        raise UnsupportedModelError(
            f"method 'simkd': the {owner}'s last map has {shape[0]} channels, its classifier reads "
            f"{classifier.in_features} values; it must read the pooled map",
            f"choose a method on logits or on the embedding, or name the map: distill.{owner}_taps",
        )


def _inside(layout: Layout, path: str, shape: tuple[int, int, int]) -> Layout:
    """The layout once the module at `path` is the first of a sequence that gives `shape`."""
    stages = tuple(f"{path}.0.{p[len(path) + 1 :]}" if p.startswith(f"{path}.") else p for p in layout.stages)
    return replace(layout, stages=stages, shapes=(*layout.shapes[:-1], shape))
