"""Students that are scored run in another order of work, with the same outcome."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import fused as room
from edgekd.blocks import Classifier
from edgekd.fused import fused
from edgekd.nets import Outputs, tapped_forward
from edgekd.probing import untouched
from edgekd.proxies import Trial, proxy
from edgekd.spaces import search_space, space_names
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.scorer import Scorer, in_groups, moved

SPEC = ModelSpec(Preprocessing(20, 20, "grey", (0.0,), (1.0,)), ("a", "b", "c"))


def images(count: int = 6, size: int = 20) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1))


def student(space: str, draw: int) -> nn.Module:
    made = search_space(space, SPEC, 8, (3, 5))
    rng = np.random.default_rng(draw)
    model = made.build(tuple(int(rng.integers(n)) for n in made.choices), torch.Generator().manual_seed(0))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training: of both signs
            nn.init.normal_(module.weight, 0.3, 1.0, generator=torch.Generator().manual_seed(2))
            nn.init.normal_(module.bias, 0.0, 1.0, generator=torch.Generator().manual_seed(3))
    return model.train()


def assert_close(found: Outputs, expected: Outputs) -> None:
    for ours, theirs in zip(
        (found.logits, found.embedding, found.features),
        (expected.logits, expected.embedding, expected.features),
        strict=True,
    ):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("how", ["cpu", "gpu"])
@pytest.mark.parametrize("space", space_names())
def test_a_fused_student_answers_as_it_is_written(
    space: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both orders of work; that of a GPU runs on any device."""
    if how == "gpu":
        monkeypatch.setattr(room._Link, "__call__", room._Link.launched)
    for draw in range(3):
        model = student(space, draw)
        before = copy.deepcopy(model.state_dict())
        with untouched(model, 0), torch.no_grad():
            expected = tapped_forward(model, images(), 3)
        assert isinstance(model, Classifier)
        with fused(model), torch.no_grad():
            found = model.outputs(images())
        assert_close(found, expected)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_last_map_of_one_pixel_is_looked_through() -> None:
    """The features are then the last larger map, as they are of any network."""
    layers = [nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4)]
    model = Classifier(nn.Sequential(*layers), 4, 3).train()
    nn.init.normal_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    with torch.no_grad():
        expected = tapped_forward(model, images(5, 2), 3)
    assert expected.features is not None
    assert expected.features.shape == (5, 4, 2, 2)
    assert_close(Trial(model, images(5, 2), classes=3, fresh=True).outputs, expected)


def test_maps_without_variance_stay_finite() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1),
                          nn.BatchNorm2d(4)).train()  # fmt: skip
    with torch.no_grad(), fused(model):
        assert torch.isfinite(model(torch.full((4, 1, 8, 8), 1e4))).all()


def scorer(score: str = "diswot") -> Scorer:
    draw = torch.Generator().manual_seed(5)
    logits, embedding, maps = (torch.randn(6, *shape, generator=draw) for shape in ((3,), (20,), (20, 4, 4)))
    teacher = Outputs(logits, embedding, maps)
    space = search_space("mobile-cnn", SPEC, 8, (3, 5))
    return Scorer(space, score, images(), torch.arange(6) % 3, teacher, 3, 0)


def genomes() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    choices = search_space("mobile-cnn", SPEC, 8, (3, 5)).choices
    return [tuple(int(rng.integers(n)) for n in choices) for _ in range(5)]


@pytest.mark.parametrize("score", ["diswot", "diswot+nwot", "params"])
def test_students_scored_together_have_the_terms_they_have_alone(score: str) -> None:
    made = scorer(score)
    assert made.many(genomes()) == [made(genome) for genome in genomes()]


def test_a_scorer_that_was_sent_scores_alike_and_arrives_once() -> None:
    made = scorer()
    sent = pickle.dumps(made)
    there = pickle.loads(sent)
    assert there is pickle.loads(sent)
    assert there.many(genomes()) == made.many(genomes())
    assert pickle.loads(pickle.dumps(replace(made, seed=1)))(genomes()[0]) != made(genomes()[0])


def test_a_gpu_gets_groups_for_all_processes_and_a_cpu_single_students() -> None:
    many = [(number,) for number in range(50)]
    assert in_groups(many, "cpu", 2) == [[genome] for genome in many]
    assert [len(group) for group in in_groups(many, "cuda", 1)] == [32, 18]
    assert [len(group) for group in in_groups(many, "cuda", 8)] == [7] * 7 + [1]
    assert in_groups([], "cuda", 8) == []


def test_weights_moved_in_one_piece_are_the_same() -> None:
    model = student("hybrid", 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moves: list[Tensor] = []

    def move(weights: Tensor) -> Tensor:
        moves.append(weights)
        return weights.clone()

    moved(model, move)
    assert len(moves) == 1
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len({value.untyped_storage().data_ptr() for value in model.parameters()}) == 1


@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_a_search_scores_as_a_plain_pass_does(color: str) -> None:
    channels = 1 if color == "grey" else 3
    spec = ModelSpec(Preprocessing(20, 20, color, (0.0,) * channels, (1.0,) * channels), ("a", "b", "c"))
    space = search_space("mobile-cnn", spec, 8, (3, 5))
    batch = 3 + torch.randn(6, channels, 20, 20, generator=torch.Generator().manual_seed(4))
    made = replace(scorer(), space=space, inputs=batch)
    for genome in genomes():
        network = space.build(genome, torch.Generator().manual_seed(0))
        plain = proxy("diswot").measure(Trial(network, batch, made.labels, made.teacher, 3, 0))
        assert made(genome) == pytest.approx(plain, rel=1e-3)
