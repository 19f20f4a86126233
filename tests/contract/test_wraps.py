"""Methods that change the student: what is exported is what was trained, and nothing more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from wrapped import (
    CLASSES,
    KEPT,
    LABELS,
    SPEC,
    WRAPS,
    Cnn,
    case,
    images,
    integers,
    tapped,
    teacher,
    trained,
    zs,
    zt,
)

from edgekd import export
from edgekd.backends import backend
from edgekd.distillers import methods, refuse_unmet
from edgekd.distillers.dho import dho_loss, mixed_log_probabilities
from edgekd.distillers.ofa import ofa_loss
from edgekd.distillers.promptkd import promptkd_loss
from edgekd.distillers.simkd import Projector, simkd_loss
from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import lower
from edgekd.quantize.scheme import QuantScheme

# ---------------------------------------------------------------- golden values


def agree(value: Tensor, wanted: float) -> None:
    assert value.shape == ()
    assert value.item() == pytest.approx(wanted, rel=1e-6)


def agree_with_gradient(value: Tensor, given: Tensor, entry: dict[str, Any], name: str) -> None:
    agree(value, entry["value"])
    (gradient,) = torch.autograd.grad(value, given)
    assert float(gradient.norm()) == pytest.approx(entry["grad_l2"][name], rel=1e-6)


@pytest.mark.parametrize("key", ["ofa_eps1", "ofa_eps1.5"])
def test_ofa_is_that_of_the_authors(key: str, golden: dict[str, Any]) -> None:
    entry, student = golden["losses"][key], zs()
    value = ofa_loss(student, zt(), LABELS, entry["params"]["eps"], entry["params"]["T"])
    agree_with_gradient(value, student, entry, "zs")


def test_promptkd_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    entry, student = golden["losses"]["promptkd_w1000"], zs()
    (method,) = methods("promptkd")
    assert method.weight == entry["params"]["weight"]
    value = method.weight * promptkd_loss(student, zt(), entry["params"]["tau"])
    agree_with_gradient(value, student, entry, "zs")


def test_dho_is_the_reference(golden: dict[str, Any]) -> None:
    entry, student = golden["losses"]["dho_T2"], zs()
    labels = torch.tensor([0, 3, -1, -1])
    agree_with_gradient(dho_loss(student, student, zt(), labels, entry["params"]["T"]), student, entry, "zs")


def test_the_mix_of_dho_is_the_reference(golden: dict[str, Any]) -> None:
    entry = golden["losses"]["dho_mix_logp"]
    mixed = mixed_log_probabilities(zs(), zt(), entry["params"]["alpha"], entry["params"]["beta"])
    agree(-mixed.gather(1, LABELS[:, None]).mean(), entry["value"])


def projected() -> tuple[Tensor, Tensor]:
    """The student map of the golden file and its projection, weights 0.1 sin(k I(shape))."""
    student = torch.sin(0.11 * integers(4, 5, 8, 8)).relu().requires_grad_()
    projector = Projector(5, 8, factor=2, pool=2).double().train()
    convolutions = [layer for layer in projector if isinstance(layer, nn.Conv2d)]
    for convolution, k in zip(convolutions, (0.31, 0.43, 0.59), strict=True):
        convolution.weight.data = 0.1 * torch.sin(k * integers(*convolution.weight.shape))
    made: Tensor = projector(student)
    return student, made


def test_simkd_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    student, made = projected()
    teacher = torch.cos(0.07 * integers(4, 8, 4, 4)).relu()
    agree_with_gradient(simkd_loss(made, teacher), student, golden["losses"]["simkd_mse"], "f2")


def test_the_reused_classifier_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    logits = F.linear(projected()[1].mean((2, 3)), 0.1 * torch.sin(0.7 * integers(6, 8)))
    agree(logits.sum(), golden["losses"]["simkd_logits_sum"]["value"])


# ---------------------------------------------------------------- the promises of a wrap


@pytest.mark.parametrize("name", WRAPS)
def test_the_deployed_network_gives_the_logits_of_the_wrap(name: str) -> None:
    made = trained(name)
    with torch.no_grad():
        exact = made.wrapped(images(16, 1)).logits
        torch.testing.assert_close(made.deploy()(images(16, 1)), exact, rtol=0, atol=1e-5)
    assert float((exact[0] - exact[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", [name for name in WRAPS if name not in KEPT])
def test_what_only_training_needs_is_dropped(name: str) -> None:
    made = trained(name)
    network = made.deploy()
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in made.plain.state_dict().items()
    }
    assert sum(p.numel() for p in made.wrapped.parameters()) > sum(p.numel() for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        # projector 16 -> 12 -> 12 -> 24 with batch norm, and the teacher's classifier of 24 inputs
        ("simkd", 16 * 12 + 9 * 12 * 12 + 12 * 24 + 2 * (12 + 12 + 24) + 25 * 10, 17 * 10),
        ("promptkd", 17 * 24 + 25 * 24 + 24 * 10, 17 * 10),
        ("dho", 17 * 10, 0),  # the second head
    ],
)
def test_what_inference_needs_is_kept_and_the_rest_gone(name: str, kept: int, dropped: int) -> None:
    made = trained(name)
    network = made.deploy()
    before = sum(p.numel() for p in made.plain.parameters())
    assert sum(p.numel() for p in network.parameters()) == before + kept - dropped
    assert not any(module._forward_hooks for module in network.modules())


SYMMETRIC = QuantScheme("s8", symmetric=True, weight_max=127, quantize_output=False)
ASYMMETRIC = QuantScheme("u8", symmetric=False, weight_max=127, quantize_output=True)


@dataclass
class Exported:
    """A deployed student on its way to a device: the graph, and the float ONNX file."""

    graph: fx.GraphModule
    path: Path
    exact: Tensor  # of images(5, 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @cache
    def of(name: str) -> Exported:
        made, path = trained(name), tmp_path_factory.mktemp(name) / "student.onnx"
        with torch.no_grad():
            exact = made.wrapped(images(5, 1)).logits
        graph = capture(made.deploy(), SPEC.input_shape)
        export.save(export.to_onnx(graph, SPEC), path)
        return Exported(graph, path, exact)

    return of


@pytest.mark.backends
@pytest.mark.parametrize("name", WRAPS)
def test_the_deployed_network_exports(name: str, exported: Callable[[str], Exported]) -> None:
    exact = exported(name).exact.numpy()
    session = backend("onnxruntime").open(exported(name).path)
    np.testing.assert_allclose(session.run(images(5, 1).numpy()), exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(session.run(images(5, 1)[:1].numpy()), exact[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.backends
@pytest.mark.parametrize(
    ("name", "scheme"), [("simkd", SYMMETRIC), ("promptkd", ASYMMETRIC), ("dho", ASYMMETRIC)]
)
def test_what_is_kept_can_be_quantized(
    name: str, scheme: QuantScheme, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    graph, model = exported(name).graph, onnx.load(exported(name).path)
    sites = find_sites(graph, scheme)
    integer = insert(graph, sites, calibrate(graph, sites, [images(64, 2)], scheme, "mse"), scheme).eval()
    kind: Any = "uint8" if scheme.dialect == "u8" else "int8"
    path = tmp_path / "student.onnx"
    export.save(lower(model, parameters_of(integer, sites), sites, kind), path)
    with torch.no_grad():
        exact = integer(images(32, 1)).numpy()
    got = backend("onnxruntime").open(path, optimize=False).run(images(32, 1).numpy())  # type: ignore[call-arg]
    np.testing.assert_allclose(got, exact, atol=0.02 * float(np.ptp(exact)))


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_reach_the_student_and_all_that_is_trained_along(name: str) -> None:
    made = case(name, steps=0)
    made.term().backward()
    for key, parameter in (*made.wrapped.named_parameters(), *made.method.named_parameters()):
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
    dead = [
        key
        for key, p in (*made.wrapped.named_parameters(), *made.method.named_parameters())
        if p.grad is not None and not float(p.grad.norm())
    ]
    assert all(key.endswith("bias") for key in dead), dead  # a bias before batch norm has none


@pytest.mark.parametrize("name", ["simkd", "promptkd"])
def test_what_comes_from_the_teacher_stays_as_it_is(name: str) -> None:
    network = teacher()
    made = case(name, network, steps=3)
    classifier: Any = network.model.get_submodule("classifier")
    weight: Tensor = classifier.weight
    kept: Any = made.deploy().get_submodule("classifier")
    if name == "simkd":
        assert torch.equal(kept.weight, weight)
        assert kept.weight is not weight
    else:
        vectors = kept.get_submodule("vectors").weight
        torch.testing.assert_close(vectors, 100 * F.normalize(weight, dim=1))
    assert not any(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", WRAPS)
def test_only_training_sees_what_only_training_needs(name: str) -> None:
    made = trained(name)
    seen = made.wrapped.eval()(images())
    assert (seen.exits, seen.peer, seen.extra_maps) == ((), None, ())
    seen = made.wrapped.train()(images())
    assert seen.logits.shape == (4, CLASSES)
    given = (len(seen.exits), seen.peer is not None, len(seen.extra_maps))
    assert given == {"ofa": (3, False, 0), "dho": (2, False, 0), "lsskd": (3, False, 3),
                     "dml": (0, True, 0), "bsd": (0, True, 1)}.get(name, (0, False, 0))  # fmt: skip


@pytest.mark.parametrize("name", WRAPS)
def test_a_copy_of_a_wrap_lives_alone(name: str) -> None:
    """The training loop averages weights in a copy."""
    made = trained(name)
    exact = made.wrapped.eval()(images()).logits
    twin = copy.deepcopy(made.wrapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(made.wrapped(images()).logits, exact)
    twin.load_state_dict(made.wrapped.state_dict())
    assert torch.equal(twin(images()).logits, exact)
    deployed: nn.Module = twin.deploy()  # type: ignore[operator]
    torch.testing.assert_close(deployed(images()), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WRAPS)
def test_a_student_is_changed_by_one_method_only(name: str) -> None:
    (method,) = methods(name)
    wrapped = trained("ofa").wrapped
    with pytest.raises(UsageError, match=f"'{name}' changes the student"):
        method.wrap(wrapped, wrapped(images()), teacher())


@pytest.mark.parametrize("name", KEPT)
def test_a_network_that_goes_on_after_its_classifier_is_refused(name: str) -> None:
    class Softened(Cnn):
        def forward(self, x: Tensor) -> Tensor:
            return 0.1 * super().forward(x)

    (method,) = methods(name)
    shown = tapped(Softened(), *method.needs.student)
    with pytest.raises(UnsupportedModelError, match="goes on after"):
        method.wrap(shown, shown(images()), teacher())


def test_needs_are_checked_before_training() -> None:
    def refused(name: str, teacher_taps: tuple[str, ...], *, labels: bool = True) -> bool:
        student = ("logits", "embedding", "features", "stages")
        try:
            refuse_unmet(methods(name), teacher_taps=teacher_taps, student_taps=student, labels=labels)
        except UsageError:
            return True
        return False

    black_box, torch_teacher = ("logits",), ("logits", "embedding", "features", "stages")
    assert [name for name in (*WRAPS, "hard") if refused(name, black_box)] == ["simkd", "promptkd", "hard"]
    assert not any(refused(name, torch_teacher) for name in (*WRAPS, "hard"))
    without = [name for name in (*WRAPS, "hard") if not refused(name, torch_teacher, labels=False)]
    assert without == ["simkd", "promptkd", "dho", "hard"]  # dho: some samples may have none
    assert not methods("promptkd")[0].needs.torch_teacher  # stored logits are enough
