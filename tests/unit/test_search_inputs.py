"""What a search looks at: images without labels, and a teacher that wants other images than the data's."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.calibrated import Subject, store_table
from edgekd.errors import TeacherError
from edgekd.nets import tapped_forward
from edgekd.recipe import load_recipe
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.ready import ready_teacher
from edgekd.stages.scorer import Scorer
from edgekd.stages.search import predictor, scoring_batch
from edgekd.target import find_target
from edgekd.teacher import LoadedTeacher

SPEC = ModelSpec(Preprocessing(16, 16, "grey", (0.5,), (0.5,)), ("a", "b", "c"))
SPACE = search_space("cifar-resnet", SPEC, 8, (3,))


def _network() -> nn.Module:
    return SPACE.build((0,) * len(SPACE.choices), torch.Generator().manual_seed(0)).eval()


def test_a_search_on_images_without_labels_asks_the_teacher_and_scores() -> None:
    network = _network()

    def logits(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(inputs)
        return found

    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)
    data = SimpleNamespace(train_images=images, train_labels=np.full(40, -1, np.int64))
    recipe = load_recipe(None, {"search.batch_size": 16, "data.labelled_fraction": 0.5})
    bench = SimpleNamespace(recipe=recipe, data=data, spec=SPEC, teacher=SimpleNamespace(logits=logits))
    inputs, labels = scoring_batch(bench)  # type: ignore[arg-type]
    assert torch.equal(labels, logits(inputs).argmax(1))
    with torch.no_grad():
        teacher = tapped_forward(network, inputs, 3)
    for score in ("diswot", "nwot", "snip"):
        terms = Scorer(SPACE, score, inputs, labels, teacher, 3, 0)((1,) + (0,) * (len(SPACE.choices) - 1))
        assert terms
        assert all(math.isfinite(value) for value in terms.values())


def test_images_that_are_not_square_have_the_table_of_their_longer_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, subject = find_target("jetson"), Subject("mobile-cnn", (1, 24, 24), 3)
    made: dict[str, object] = {
        "format": 3,
        "target": target.id,
        "precision": "int8",
        "runtime": "tensorrt 10",
    }
    on = {"clock": "wall", "device": "Orin", "space": "mobile-cnn", "input": [1, 24, 24], "classes": 3}
    validation = {"median_error_percent": 4.0, "kendall_tau": 0.9}
    table = {"header": made | on, "line": {}, "validation": validation, "entries_ms": {"empty": 0.1}}
    path, said = store_table(target, subject, table), list[str]()
    run = SimpleNamespace(target=target, reporter=SimpleNamespace(say=said.append))
    spec = ModelSpec(Preprocessing(16, 24, "grey", (0.5,), (0.5,)), ("a", "b", "c"))
    model = predictor(SimpleNamespace(recipe=load_recipe(None, {}), run=run, spec=spec))  # type: ignore[arg-type]
    assert model.table is not None
    assert (model.table.path, model.error_percent) == (path, 4.0)
    assert said[0].startswith("  latency by the table of mobile-cnn, 1x24x24, 3 classes (median error 4 %")


@pytest.mark.parametrize("own", [{}, {"budget.max_latency_ms": 0.2}])
def test_under_a_latency_of_ones_own_the_error_of_a_sum_of_layers_is_told(
    own: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative budget is corrected by the finalists' measurements; an absolute one cannot be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("edgekd.cost.is_this_machine", lambda _: True)
    said = list[str]()
    run = SimpleNamespace(target=find_target("x86-avx2"), reporter=SimpleNamespace(say=said.append))
    recipe = load_recipe(None, {"target": "x86-avx2", **own})
    model = predictor(SimpleNamespace(recipe=recipe, run=run, spec=SPEC))  # type: ignore[arg-type]
    assert model.kind == "layer-table"
    assert len(said) == len(own)
    assert all("edgekd targets calibrate x86-avx2 --precision int8 --image-size 16" in text for text in said)


def test_a_teacher_of_another_image_size_is_refused_with_the_sizes(tmp_path: Path) -> None:
    """A classifier of flattened maps takes images of one size alone."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 3))
    loaded = LoadedTeacher(network, None, "0" * 64, 0.1)
    inputs = torch.zeros(2, *SPEC.input_shape)
    with pytest.raises(
        TeacherError, match=r"'mine:big' refuses float32 images of shape \(1, 1, 16, 16\)"
    ) as caught:
        ready_teacher(loaded, "mine:big", SPEC, folder=tmp_path, inputs=inputs, threads=1, say=lambda _: None)
    assert "--image-size" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
