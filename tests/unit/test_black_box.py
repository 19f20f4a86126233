"""What a file of an ONNX classifier shows beside its logits is what the network has there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd import export
from edgekd.backends import backend
from edgekd.black_box import cut_out
from edgekd.nets import Outputs, tapped_forward
from edgekd.quantize.capture import capture
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.search import left_out

SPEC = ModelSpec(Preprocessing(16, 16, "grey", (0.0,), (1.0,)), ("a", "b", "c"))


def write(model: nn.Module, path: Path) -> Path:
    export.save(export.to_onnx(capture(model.eval(), SPEC.input_shape), SPEC), path)
    return path


@pytest.mark.backends
@pytest.mark.parametrize("name", ["cifar-resnet", "hybrid"])
def test_embedding_and_features_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    space = search_space(name, SPEC, 8, (3,))
    model = space.build((0,) * len(space.choices), torch.Generator().manual_seed(0)).eval()
    inputs = torch.randn(5, *SPEC.input_shape)
    with torch.no_grad():
        expected = tapped_forward(model, inputs, 3)
    found = cut_out(write(model, tmp_path / "teacher.onnx"), tmp_path)
    assert set(found) == {"embedding", "features"}
    for part, path in found.items():
        got = backend("onnxruntime").open(path, threads=1).run(inputs.numpy())
        np.testing.assert_allclose(got, getattr(expected, part).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.backends
def test_a_convolutional_head_shows_nothing_more(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert cut_out(write(model, tmp_path / "teacher.onnx"), tmp_path) == {}


def test_what_a_score_does_without_is_said() -> None:
    logits, rest = torch.zeros(4, 3), torch.zeros(4, 8)
    assert len(left_out("diswot", Outputs(logits))) == 2
    assert "semantic" in left_out("diswot", Outputs(logits, features=torch.zeros(4, 2, 3, 3)))[0]
    assert left_out("diswot", Outputs(logits, rest, torch.zeros(4, 2, 3, 3))) == []
    assert left_out("nwot+synflow", Outputs(logits)) == []
    assert len(left_out("relation", Outputs(logits))) == 1
