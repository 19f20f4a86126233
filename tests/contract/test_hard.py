"""HARD moves images to where student and teacher disagree, and leaves everything else alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from wrapped import SIZE, Cnn, context, images, tapped, teacher

from edgekd.distillers import Context, methods
from edgekd.distillers.hard import Hard, disagreement, moved
from edgekd.nets import Batch
from edgekd.taps import Tapped


@dataclass
class Lab:
    method: Hard
    student: Tapped
    teacher: Tapped
    batch: Batch

    def augment(self) -> Batch:
        return self.method.augment(self.batch, self.student, self.teacher, context())

    def apart(self, inputs: Tensor) -> float:
        """The disagreement of the two networks in training, without a trace in them."""
        student = copy.deepcopy(self.student)
        with torch.no_grad():
            return float(disagreement(student(inputs).logits, self.teacher(inputs).logits, 4.0))


def lab(**options: Any) -> Lab:
    (method,) = methods("hard", {"hard": {"ceiling": 1e9, "floor": 1e8, **options}})
    assert isinstance(method, Hard)
    network, student = teacher(), tapped(Cnn(3).train())
    with torch.no_grad():  # logits with something to disagree about
        for model, factor in ((network, 20.0), (student, 5.0)):
            next(model.model.get_submodule("classifier").parameters()).mul_(factor)
    smooth = F.interpolate(images(8)[:, :, ::4, ::4], SIZE, mode="bilinear")
    return Lab(method, student, network, Batch(smooth, torch.arange(8), torch.arange(10, 18)))


def test_hard_raises_the_disagreement() -> None:
    room = lab()
    made = room.augment()
    plain, hard = made.inputs[:8], made.inputs[8:]
    assert room.apart(hard) > 1.1 * room.apart(plain)
    more = lab(ascent_steps=6)
    assert more.apart(more.augment().inputs[8:]) > room.apart(hard)


def test_hard_keeps_the_images_and_adds_their_labels_and_numbers() -> None:
    room = lab()
    made = room.augment()
    assert torch.equal(made.inputs[:8], room.batch.inputs)
    assert torch.equal(made.labels, room.batch.labels.repeat(2))
    assert torch.equal(made.index, room.batch.index.repeat(2))
    assert not made.inputs.requires_grad


def test_hard_touches_neither_network() -> None:
    room = lab()
    networks = nn.ModuleList([room.student, room.teacher])
    state, modes = copy.deepcopy(networks.state_dict()), [m.training for m in networks.modules()]
    room.augment()
    assert all(torch.equal(value, state[key]) for key, value in networks.state_dict().items())
    assert [m.training for m in networks.modules()] == modes
    assert all(p.grad is None for p in networks.parameters())


def test_hard_is_a_function_of_the_generator() -> None:
    assert torch.equal(lab().augment().inputs, lab().augment().inputs)
    room = lab()
    other = Context(torch.zeros(()), torch.zeros(()), 10, 100, torch.Generator().manual_seed(1))
    made = room.method.augment(room.batch, room.student, room.teacher, other)
    assert not torch.equal(made.inputs, lab().augment().inputs)


def test_hard_stays_near_the_images_and_keeps_what_the_teacher_says() -> None:
    free, near = lab(prior_weight=0.0, teacher_weight=0.0), lab(prior_weight=1e4, teacher_weight=0.0)
    shifts = [float((r.augment().inputs[8:] - r.batch.inputs).square().mean()) for r in (free, near)]
    assert shifts[1] < 0.5 * shifts[0]
    said = []
    for weight in (0.0, 10.0):
        room = lab(teacher_weight=weight, ascent_steps=4)
        hard = room.augment().inputs[8:]
        with torch.no_grad():
            before, after = (room.teacher(x).logits for x in (room.batch.inputs, hard))
        said.append(float(disagreement(after, before, 4.0)))
    assert said[1] < 0.7 * said[0]


def test_hard_stops_above_the_ceiling_and_goes_on_below_the_floor() -> None:
    room = lab(ceiling=0.0, floor=0.0)
    start = room.augment().inputs[8:]
    assert float(room.method.climbing) == 0  # the ceiling was exceeded
    still = room.augment().inputs[8:]
    torch.testing.assert_close(still, room.batch.inputs, rtol=0, atol=1e-4)
    assert not torch.allclose(start, room.batch.inputs, rtol=0, atol=1e-4)
    room.method.ceiling = 1e9  # between floor and ceiling it waits
    room.augment()
    assert float(room.method.climbing) == 0
    room.method.floor = 1e8
    room.augment()
    assert float(room.method.climbing) == 1
    assert "climbing" in room.method.state_dict()


def test_no_offsets_leave_an_image_as_it_is() -> None:
    x = images()
    torch.testing.assert_close(moved(x, torch.zeros(4, 2, 3), torch.zeros_like(x)), x, rtol=0, atol=1e-5)
    shift = torch.zeros(4, 2, 3)
    shift[:, 0, 2] = 2 / SIZE  # one pixel, of a width of 2
    torch.testing.assert_close(moved(x, shift, torch.zeros_like(x))[..., :-1], x[..., 1:], rtol=0, atol=1e-4)


class _NoWaiting(TorchDispatchMode):
    """Refuses what cannot be captured as a CUDA graph: waiting for a value, shapes that depend on values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            raise AssertionError(f"{func} inside a step")
        return func(*args, **(kwargs or {}))


def test_hard_can_be_captured() -> None:
    room = lab()
    with _NoWaiting():  # type: ignore[no-untyped-call]
        room.augment()
    assert room.method.capturable
