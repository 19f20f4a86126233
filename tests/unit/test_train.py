"""One training loop: resumable to the bit, honest about failure, and fed with views that never change."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import CLASSES, SIZE, shapes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgekd.distillers import methods
from edgekd.errors import DeviceMemoryError, StorageError, TrainingDivergedError
from edgekd.logit_store import LogitStore
from edgekd.loop import Loop
from edgekd.optimizer import make_optimizer, rate_share
from edgekd.plan import Pace, Plan, probe
from edgekd.spec import Preprocessing
from edgekd.tasks.classification import normalise
from edgekd.train import Stage, evaluate, fit, load_checkpoint
from edgekd.views import AUGMENTATIONS, CachedTeacher, Views

PREPROCESSING = Preprocessing(SIZE, SIZE, "grey", (0.1,), (0.3,))
PLANS = {
    "f32": Plan(1, False, False),
    "f32 channels-last": Plan(1, False, True),
    "bf16": Plan(1, True, True),
}
IMAGES, LABELS = (torch.from_numpy(part) for part in shapes(64, 3))
PIXELS = IMAGES[:, None]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES)),
    )  # fmt: skip


def views(count: int = 2, augment: str = "crop-flip", seed: int = 0) -> Views:
    return Views(PIXELS, PREPROCESSING, augment, count, seed)


def shown(made: Views, view: int, index: Tensor) -> Tensor:
    made.select(view)
    return made.batch(index)


def teacher(inputs: Tensor) -> Tensor:
    """Any fixed function of the pixels will do."""
    return torch.stack([inputs[:, 0, row].sum(1) for row in (2, 6, 9, 13)], 1)


def stage(checkpoint: Path | None = None, **changes: Any) -> Stage:
    seen = changes.pop("views", None) or views()
    options: dict[str, Any] = {
        "name": "distill",
        "model": model(),
        "views": seen,
        "labels": LABELS,
        "teacher": CachedTeacher(changes.pop("logits", teacher), seen),
        "distillers": methods("kd"),
        "epochs": 4,
        "batch_size": 21,
        "learning_rate": 1e-2,
        "weight_decay": 1e-2,
        "ema_decay": 0.9,
        "seed": 0,
        "plan": PLANS["f32"],
        "checkpoint": checkpoint,
    }
    return Stage(**(options | changes))


def first_weight(made: Stage) -> Tensor:
    """Of the first layer."""
    return next(made.model.parameters()).detach()


def nothing(what: str, done: int, total: int) -> None: ...


class Killed(Exception):  # noqa: N818 - stands for a signal
    """Stands for a process that dies."""


def killed_at(step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            raise Killed

    return progress


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


# ---------------------------------------------------------------- resuming


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_a_killed_training_ends_with_the_same_bits(plan: str, step: int, tmp_path: Path) -> None:
    """64 images in batches of 21 are three steps an epoch; steps count from 1."""
    straight = stage(plan=PLANS[plan])
    history = fit(straight, nothing)
    with pytest.raises(Killed):
        fit(stage(tmp_path / "c.pt", plan=PLANS[plan]), killed_at(step))
    stored = load_checkpoint(tmp_path / "c.pt")
    assert (0 if stored is None else len(stored["history"])) == (step - 1) // 3
    resumed = stage(tmp_path / "c.pt", plan=PLANS[plan])
    again = fit(resumed, nothing)
    assert without_time(again) == without_time(history)
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), straight.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = stage(tmp_path / "c.pt")
    fit(first, nothing)
    steps: list[int] = []
    again = stage(tmp_path / "c.pt")
    fit(again, lambda what, done, total: steps.append(done))
    assert not steps
    assert torch.equal(first_weight(again), first_weight(first))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"junk\n", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(damage)
    with pytest.raises(StorageError) as caught:
        load_checkpoint(tmp_path / "c.pt")
    assert str(tmp_path / "c.pt") in caught.value.message
    assert "delete it" in caught.value.hint


def test_a_cut_off_checkpoint_is_named(tmp_path: Path) -> None:
    fit(stage(tmp_path / "c.pt", epochs=1), nothing)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError):
        load_checkpoint(tmp_path / "c.pt")


def test_the_result_depends_on_the_seed(tmp_path: Path) -> None:
    made = [stage(seed=seed) for seed in (0, 0, 1)]
    for each in made:
        fit(each, nothing)
    weights = [first_weight(each) for each in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ---------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    calls: list[int] = []

    def breaks_in_the_second_view(inputs: Tensor) -> Tensor:
        calls.append(1)
        return teacher(inputs) * (math.nan if len(calls) > 1 else 1.0)

    with pytest.raises(TrainingDivergedError) as caught:
        fit(stage(tmp_path / "c.pt", logits=breaks_in_the_second_view), nothing)
    assert "distill: the loss became nan at step 4 (epoch 2), in the term of: kd" in caught.value.message
    assert "--set distill.learning_rate=" in caught.value.hint
    assert caught.value.exit_code == 17
    stored = load_checkpoint(tmp_path / "c.pt")
    assert stored is not None
    assert len(stored["history"]) == 1
    assert all(torch.isfinite(value).all() for value in stored["model"].values())


def test_a_loss_that_is_not_finite_from_the_first_step_on_is_not_blamed_on_the_rate() -> None:
    with pytest.raises(TrainingDivergedError) as caught:
        fit(stage(logits=lambda inputs: teacher(inputs) * math.nan), nothing)
    assert "at step 1 (epoch 1), in the term of: kd" in caught.value.message
    assert "no epoch was finished" in caught.value.hint
    assert "learning_rate" not in caught.value.hint


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes."
        ),
    ],
)
def test_steps_that_do_not_fit_into_the_machine_name_half_the_batch(error: Exception) -> None:
    class Huge(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            raise error

    with pytest.raises(DeviceMemoryError) as caught:
        fit(stage(model=Huge(nn.Linear(1, 1)), batch_size=20), nothing)
    assert "20 images a step do not fit into the memory of the machine: " in caught.value.message
    assert ("you tried to allocate" if str(error) else "MemoryError") in caught.value.message
    assert "--set distill.batch_size=10" in caught.value.hint


def test_steps_that_do_not_fit_into_the_memory_name_half_the_batch() -> None:
    class Huge(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    for work in (
        lambda: fit(stage(model=Huge(nn.Linear(1, 1)), batch_size=20), nothing),
        lambda: probe(Huge(nn.Linear(1, 1)), normalise(PIXELS[:20], PREPROCESSING), 1, seconds=0.0),
    ):
        with pytest.raises(DeviceMemoryError) as caught:
            work()
        assert "20 images a step do not fit" in caught.value.message
        assert "CUDA out of memory" in caught.value.message
        assert "--set distill.batch_size=10" in caught.value.hint
        assert caught.value.exit_code == 22


# ---------------------------------------------------------------- steps


def test_the_losses_are_those_of_a_plain_loop() -> None:
    """Everything but schedule and views written out again: KD at temperature 4, weights 0.9 and 0.1."""
    history = fit(stage(ema_decay=0.0, epochs=3), nothing)
    student, seen = model().train(), views()
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for step in range(9):
        epoch, number = divmod(step, 3)
        seen.select(epoch % 2)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        index = order[21 * number : 21 * (number + 1)]
        logits, taught = student(seen.batch(index)), teacher(seen.batch(index))
        ours, theirs = (F.log_softmax(each / 4, 1) for each in (logits, taught))
        loss = 0.9 * 16 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        loss = loss + 0.1 * F.cross_entropy(logits, LABELS[index])
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate_share(step / 9, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    plain = [sum(losses[start : start + 3]) / 3 for start in (0, 3, 6)]
    assert [row["loss"] for row in history] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_every_step_runs_with_the_weights_of_the_step_before(plan: str) -> None:
    """All images in one batch and one view: an epoch is a step, and the losses follow the weights. Autocast
    caches its casts of the weights; a cache that outlives its step would repeat the first loss."""
    changes: dict[str, Any] = {
        "views": views(augment="none"), "batch_size": 64, "epochs": 6, "plan": PLANS[plan],
    }  # fmt: skip
    losses = [row["loss"] for row in fit(stage(**changes), nothing)]
    assert len(set(losses)) == 6
    assert losses[-1] < losses[0] * 0.99
    exact = [row["loss"] for row in fit(stage(**(changes | {"plan": PLANS["f32"]})), nothing)]
    assert losses == pytest.approx(exact, rel=0.03)


def test_the_model_ends_averaged_in_evaluation_mode_and_contiguous() -> None:
    made = stage(plan=PLANS["f32 channels-last"])
    fit(made, nothing)
    assert not made.model.training
    assert all(parameter.is_contiguous() for parameter in made.model.parameters())


def test_without_averaging_the_last_weights_stay() -> None:
    """A decay of zero follows the weights at once; a large one stays near the start."""
    start = next(model().parameters()).detach()
    moved = []
    for decay in (0.0, 0.9999):
        made = stage(ema_decay=decay, epochs=8)
        fit(made, nothing)
        moved.append(float((first_weight(made) - start).norm()))
    assert moved[0] > moved[1] > 0


def test_each_epoch_leaves_a_row_with_its_accuracy_on_held_out_images() -> None:
    held_out = (normalise(PIXELS[:16], PREPROCESSING), LABELS[:16])
    history = fit(stage(selection=held_out, epochs=2), nothing)
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(0 <= row["selection_accuracy"] <= 1 for row in history)
    assert all(math.isfinite(row["loss"]) and row["seconds"] > 0 for row in history)


def test_progress_counts_all_steps() -> None:
    seen: list[tuple[str, int, int]] = []
    fit(stage(epochs=2), lambda what, done, total: seen.append((what, done, total)))
    assert seen == [("distill", step, 6) for step in range(1, 7)]


def test_weight_decay_spares_vectors() -> None:
    for group in make_optimizer([model()], "adamw", 1e-2, 1e-2, "cpu").param_groups:
        for parameter in group["params"]:
            assert (parameter.dim() > 1) == (group["weight_decay"] > 0)
    (everything,) = make_optimizer([model()], "sgd", 1e-2, 1e-2, "cpu", decay_all=True).param_groups
    assert everything["weight_decay"] == 1e-2
    assert len(everything["params"]) == len(list(model().parameters()))


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    rates = [rate_share(step / 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_plan_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with Plan(threads=2).active():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def paced(pace: Pace, clock: list[float], steps: int, rates: Callable[[int], float]) -> list[int]:
    """Threads after each of `steps` steps of 100 images at `rates(threads)` images a second."""
    used = []
    for _ in range(steps):
        clock[0] += 100 / rates(pace.threads)
        pace.count(100)
        used.append(pace.threads)
    return used


def test_a_disturbance_costs_the_second_thread_only_for_a_while() -> None:
    clock = [0.0]
    with Plan(threads=2).active():
        pace = Pace(Plan(threads=2, one_thread_rate=1000.0), lambda: clock[0])
        quiet = {1: 900.0, 2: 1400.0}
        assert set(paced(pace, clock, 50, quiet.__getitem__)) == {2}
        assert set(paced(pace, clock, 10, {1: 600.0, 2: 100.0}.__getitem__)[4:]) == {1}
        assert torch.get_num_threads() == 1
        after = paced(pace, clock, 100, quiet.__getitem__)
        assert (after[0], after[-1], torch.get_num_threads()) == (1, 2, 2)
        assert after == sorted(after)


def test_where_threads_stall_one_goes_on_and_several_are_tried_ever_more_rarely() -> None:
    clock = [0.0]
    with Plan(threads=2).active():
        pace = Pace(Plan(threads=2, one_thread_rate=1000.0), lambda: clock[0])
        used = paced(pace, clock, 4000, {1: 700.0, 2: 70.0}.__getitem__)
    tries = [step for step in range(1, 4000) if (used[step - 1], used[step]) == (1, 2)]
    gaps = [b - a for a, b in pairwise(tries)]
    assert 4 <= len(tries) <= 8
    assert all(b >= 1.7 * a for a, b in pairwise(gaps[:-1]))


def test_one_thread_is_never_timed() -> None:
    clock = [0.0]
    with Plan(threads=1).active():
        assert set(paced(Pace(Plan(threads=1), lambda: clock[0]), clock, 20, lambda _: 1.0)) == {1}


def test_the_probe_measures_every_plan_and_takes_the_fastest() -> None:
    trial = model()
    before = [parameter.clone() for parameter in trial.parameters()]
    plan, rates = probe(trial, normalise(PIXELS[:8], PREPROCESSING), 1, seconds=0.0)
    assert rates[str(plan)] == max(rates.values())
    assert len(rates) == 3
    assert all(torch.equal(old, new) for old, new in zip(before, trial.parameters(), strict=True))
    _, exact = probe(trial, normalise(PIXELS[:8], PREPROCESSING), 1, allow_bfloat16=False, seconds=0.0)
    assert not [name for name in exact if "bf16" in name]


def test_evaluation_leaves_the_mode_alone() -> None:
    made = model().train()
    logits = evaluate(made, normalise(PIXELS, PREPROCESSING), batch_size=10)
    assert made.training
    assert logits.shape == (64, len(CLASSES))
    torch.testing.assert_close(logits, evaluate(made.eval(), normalise(PIXELS, PREPROCESSING)))


# ---------------------------------------------------------------- views


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_view_always_shows_the_same_pixels(augment: str) -> None:
    index = torch.tensor([5, 1, 40])
    first, again = (shown(views(3, augment), 0, index) for _ in range(2))
    assert torch.equal(first, again)
    whole = shown(views(3, augment), 0, torch.arange(64))
    assert torch.equal(whole[index], first)


def test_views_differ_from_each_other_and_by_seed() -> None:
    index = torch.arange(64)
    assert not torch.equal(shown(views(), 0, index), shown(views(), 1, index))
    assert not torch.equal(shown(views(seed=0), 0, index), shown(views(seed=1), 0, index))


def test_without_augmentation_there_is_one_view_of_the_plain_pixels() -> None:
    plain = views(8, "none")
    assert plain.count == 1
    assert torch.equal(shown(plain, 0, torch.arange(64)), normalise(PIXELS, PREPROCESSING))


def test_crops_move_by_one_pixel_here_and_never_flip() -> None:
    single = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
    single[0, 0, 8, 3] = 255
    places = set()
    for view in range(40):
        pixels = shown(Views(single, PREPROCESSING, "crop", 40, 0), view, torch.tensor([0]))[0, 0]
        places.add(divmod(int(pixels.argmax()), SIZE))
    assert places == {(8 + y, 3 + x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_flips_mirror_left_and_right() -> None:
    single = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)
    single[0, 0, 8, 3] = 255
    columns = set()
    for view in range(40):
        pixels = shown(Views(single, PREPROCESSING, "crop-flip", 40, 0), view, torch.tensor([0]))[0, 0]
        columns.add(int(pixels.argmax()) % SIZE)
    assert columns == {2, 3, 4, 11, 12, 13}


def test_pixels_outside_are_black_after_normalisation() -> None:
    white = torch.full((1, 1, SIZE, SIZE), 255, dtype=torch.uint8)
    found = [shown(Views(white, PREPROCESSING, "crop", 40, 0), view, torch.tensor([0])) for view in range(40)]
    assert {round(float(value), 4) for value in torch.cat(found).unique()} == {
        round((0 - 0.1) / 0.3, 4), round((1 - 0.1) / 0.3, 4)
    }  # fmt: skip


def test_cached_logits_are_those_of_the_view() -> None:
    seen = views(3)
    cached = CachedTeacher(teacher, seen, batch_size=10)
    for view in range(3):
        torch.testing.assert_close(cached.of(view), teacher(shown(seen, view, torch.arange(64))))
    index = torch.tensor([7, 3])
    torch.testing.assert_close(cached.of(1)[index], teacher(shown(seen, 1, index)))


def test_the_teacher_sees_each_view_once() -> None:
    batches: list[int] = []

    def counting(inputs: Tensor) -> Tensor:
        batches.append(len(inputs))
        return teacher(inputs)

    fit(stage(logits=counting, epochs=6), nothing)
    assert sum(batches) == 2 * 64


def test_every_second_view_blends_each_image_with_another_and_has_no_labels() -> None:
    mixed, plain = views(4, "crop-mix"), views(4, "crop")
    index = torch.arange(64)
    assert torch.equal(shown(mixed, 2, index), shown(plain, 2, index))
    assert float(mixed.labelled) == 1
    blends, own = shown(mixed, 3, index), shown(plain, 3, index)
    assert float(mixed.labelled) == 0
    towards = ((blends - own).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1)).sort().values
    assert towards[32] > 0.1
    # The image itself is at least half of the blend: what is left of it points the same way.
    centred = (own - own.mean(0)).flatten(1), (blends - blends.mean(0)).flatten(1)
    assert float((centred[0] * centred[1]).sum()) > 0.5 * float(centred[0].square().sum())


def test_blends_teach_without_their_labels() -> None:
    """With wrong labels everywhere the labels' term still vanishes in a view of blends."""
    changes: dict[str, Any] = {"views": views(2, "crop-mix"), "epochs": 2, "hard_weight": 100.0}
    history = fit(stage(labels=(LABELS + 1) % 4, **changes), nothing)
    assert history[0]["loss"] > 10 * history[1]["loss"]


def test_a_new_view_every_epoch_is_asked_of_the_teacher_once() -> None:
    batches: list[int] = []

    def counting(inputs: Tensor) -> Tensor:
        batches.append(len(inputs))
        return teacher(inputs)

    fit(stage(logits=counting, views=views(0), epochs=5), nothing)
    assert sum(batches) == 5 * 64


# ---------------------------------------------------------------- logits on disk


def stored(
    folder: Path, said: list[str], asked: list[int], key: object = "of this teacher", **changes: Any
) -> Stage:
    """A training of four views with its logits in `folder`; `asked` counts what the teacher is shown."""

    def counting(inputs: Tensor) -> Tensor:
        asked.append(len(inputs))
        return teacher(inputs)

    seen = views(4)
    store = LogitStore(folder, "logits", [key, seen.digest()], said.append, writes=True)
    taught = CachedTeacher(counting, seen, store=store)
    made: dict[str, Any] = {"checkpoint": folder / "c.pt", "views": seen, "teacher": taught} | changes
    return stage(**made)


def test_a_killed_training_does_not_ask_again_about_views_it_has_seen(tmp_path: Path) -> None:
    straight = stage(views=views(4))
    history = fit(straight, nothing)
    asked: list[int] = []
    with pytest.raises(Killed):
        fit(stored(tmp_path, [], asked), killed_at(8))
    assert sum(asked) == 3 * 64  # steps 7 to 9 show the third view
    asked.clear()
    said: list[str] = []
    resumed = stored(tmp_path, said, asked)
    assert without_time(fit(resumed, nothing)) == without_time(history)
    assert sum(asked) == 64
    assert not said
    assert torch.equal(first_weight(resumed), first_weight(straight))


@pytest.mark.parametrize("change", ["another teacher", "damaged", "cut off"])
def test_stored_logits_that_do_not_fit_are_made_again_with_a_notice(change: str, tmp_path: Path) -> None:
    asked: list[int] = []
    fit(stored(tmp_path, [], asked, checkpoint=None), nothing)
    for path in tmp_path.glob("logits-*.safetensors"):
        if change != "another teacher":
            path.write_bytes(b"damaged" if change == "damaged" else path.read_bytes()[:-40])
    asked.clear()
    said: list[str] = []
    key = change if change == "another teacher" else "of this teacher"
    fit(stored(tmp_path, said, asked, key, checkpoint=None), nothing)
    assert sum(asked) == 4 * 64
    assert len(said) == 1
    assert str(tmp_path) in said[0]
    assert "computed again" in said[0]
    asked.clear()
    fit(stored(tmp_path, said, asked, key, checkpoint=None), nothing)
    assert not asked


def test_the_digest_of_views_follows_pixels_and_augmentation() -> None:
    assert views().digest() == views(7).digest()
    others = [views(seed=1), views(augment="crop"), Views(PIXELS[1:], PREPROCESSING, "crop-flip", 2, 0)]
    others.append(Views(PIXELS, Preprocessing(SIZE, SIZE, "grey", (0.2,), (0.3,)), "crop-flip", 2, 0))
    assert len({views().digest(), *(other.digest() for other in others)}) == 5


def test_new_views_every_epoch_are_not_stored(tmp_path: Path) -> None:
    seen = views(0)
    store = LogitStore(tmp_path, "logits", [], lambda text: None, writes=True)
    fit(stage(views=seen, teacher=CachedTeacher(teacher, seen, store=store)), nothing)
    assert not list(tmp_path.iterdir())


class _Online(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return teacher(inputs)


def test_a_teacher_in_the_loop_teaches_like_its_stored_logits() -> None:
    stored, online = stage(), stage()
    online.teacher = _Online()
    losses = [[row["loss"] for row in fit(each, nothing)] for each in (stored, online)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_milestones_cut_the_rate() -> None:
    rates = [rate_share(share, 0.1, (0.5, 0.75)) for share in (0.0, 0.49, 0.5, 0.8)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_other_optimisers_learn_and_resume(optimizer: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "optimizer": optimizer, "learning_rate": 0.005, "ema_decay": 0.0, "views": views(augment="none"),
    }  # fmt: skip
    straight = stage(**changes)
    history = fit(straight, nothing)
    assert history[-1]["loss"] < history[0]["loss"]
    with pytest.raises(Killed):
        fit(stage(tmp_path / "c.pt", **changes), killed_at(7))
    resumed = stage(tmp_path / "c.pt", **changes)
    fit(resumed, nothing)
    assert torch.equal(first_weight(resumed), first_weight(straight))


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for its device, and shapes that depend on values: neither can be
    captured as a CUDA graph."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            raise AssertionError(f"{name} inside a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_step_never_waits_for_the_device(augment: str, optimizer: str) -> None:
    loop = Loop(stage(views=views(2, augment), optimizer=optimizer))
    loop.open_epoch(0)
    with _NoWaiting():  # type: ignore[no-untyped-call]
        loop.step()


def test_only_strided_depthwise_convolutions_stay_in_float() -> None:
    """In bfloat16 their backward pass would take ten times as long on a CPU."""
    dense, flat = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=4)
    strided = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    inputs = torch.randn(2, 4, 8, 8)
    with PLANS["bf16"].autocast():
        kinds = [layer(inputs).dtype for layer in (dense, flat, strided)]
        after = strided(dense(inputs))
        called = F.conv2d(inputs, strided.weight, None, 2, 1, 1, 4)
        flat_called = F.conv2d(inputs, strided.weight, None, 1, 1, 1, 4)
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert (called.dtype, flat_called.dtype) == (torch.float32, torch.bfloat16)
    assert after.dtype == torch.float32
    after.sum().backward()
    assert strided.weight.grad is not None
    assert dense.weight.grad is not None
    with PLANS["f32"].autocast():
        assert dense(inputs).dtype == torch.float32
