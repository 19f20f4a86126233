"""CRD, ReviewKD, MGD, CWD, MI-alpha, TRG, SKT, DisWOT, hidden states: golden values and shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from example_outputs import (
    INPUTS,
    batch,
    built,
    cnn,
    context,
    drawn,
    integers,
    learning,
    on_map,
    only_map,
    value,
    vit,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgekd.distillers import methods, refuse_unmet
from edgekd.distillers.ccc import ccc
from edgekd.distillers.mi import mi_bound
from edgekd.distillers.semantic import semantic_loss
from edgekd.distillers.skt import cosine_loss, flow
from edgekd.distillers.trg import global_loss, inner_loss, local_loss
from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.nets import Outputs
from edgekd.tokens import positions

ON_MAPS = ("crd", "reviewkd", "hcl", "mgd", "cwd", "mi", "trg", "skt", "relation", "semantic")
BLOCKS: dict[str, dict[str, str]] = {"hidden": {}, "mi": {"on": "tokens"}, "trg": {"on": "tokens"}}


# Golden values: the first input is the student's, and the one of `grad_l2`.


def mgd_of_the_golden_file(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = only_map(student), only_map(teacher)
    method = built("mgd", ours, theirs, alpha=2e-5, mask_ratio=0.0)
    layers = (method.align, method.generate[0], method.generate[2])
    with torch.no_grad():
        for layer, k in zip(layers, (0.31, 0.43, 0.59), strict=True):
            layer.weight.copy_(0.1 * torch.sin(k * integers(*layer.weight.shape)))
            layer.bias.zero_()
    return value(method, ours, theirs)


def skt_flow_of_the_first_sample(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (flow(m[:, :4], m[:, 4:]) for m in (student, teacher))
    return (ours - theirs)[0].square().sum()


GOLDEN: dict[str, tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = {
    "hcl_4x4": ("fs", "ft", lambda s, t: on_map("hcl", s, t)),
    "hcl_8x8": ("f2", "t8", lambda s, t: on_map("hcl", s, t)),
    "mgd_lambda0": ("f2", "t2", mgd_of_the_golden_file),
    "cwd_T4_seg": ("seg_s", "seg_t", lambda s, t: on_map("cwd", s, t, temperature=4.0)),
    "cwd_T4": ("fs", "ft", lambda s, t: on_map("cwd", s, t)),
    "mi_alpha_logit0.9": ("sc", "lb", lambda s, t: mi_bound(s, t, 0.9)),
    "mi_alpha_logit-3": ("sc", "lb", lambda s, t: mi_bound(s, t, -3.0)),
    "mi_alpha_logit3": ("sc", "lb", lambda s, t: mi_bound(s, t, 3.0)),
    "skt_cosine_sum": ("fs", "ft", lambda s, t: cosine_loss(s, t) * 4 * 4 * 4),
    "skt_fsp_sse": ("fs", "ft", skt_flow_of_the_first_sample),
    "diswot_relation": ("fs", "ft", lambda s, t: -on_map("relation", s, t)),
    "diswot_semantic": ("gs_grad", "gt_grad", lambda s, t: -semantic_loss(s, t)),
    "trg_inner": ("fs", "ft", lambda s, t: inner_loss(positions(s), positions(t))),
    "trg_global_tau0.1": ("tok_s", "tok_t", lambda s, t: global_loss(s, t, 0.1) * 5),
    "trg_local_k2": ("tok_s", "tok_t", lambda s, t: local_loss(s, t, 2, 1.0) * 5),
    "ccc": ("es", "et", lambda s, t: ccc(s[:, :1], t[:, :1])[0]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_inputs_are_those_of_the_golden_file(name: str, golden: dict[str, Any]) -> None:
    assert float(INPUTS[name].sum()) == pytest.approx(golden["inputs"][name]["sum"], abs=1e-9)
    assert float(INPUTS[name].square().sum()) == pytest.approx(golden["inputs"][name]["sumsq"], abs=1e-9)


@pytest.mark.parametrize("key", GOLDEN)
def test_value_and_gradient_are_those_of_the_golden_file(key: str, golden: dict[str, Any]) -> None:
    first, second, formula = GOLDEN[key]
    entry = golden["losses"][key]
    student = INPUTS[first].clone().requires_grad_()
    found = formula(student, INPUTS[second])
    assert found.item() == pytest.approx(entry["value"], rel=1e-6)
    if "grad_l2" in entry:
        (gradient,) = torch.autograd.grad(found, student)
        assert float(gradient.norm()) == pytest.approx(entry["grad_l2"][first], rel=1e-6)


def test_every_golden_entry_of_these_methods_is_compared(golden: dict[str, Any]) -> None:
    ours = ("crd", "hcl", "reviewkd", "mgd", "cwd", "mi_", "trg", "skt", "diswot", "ccc")
    assert {key for key in golden["losses"] if key.startswith(ours)} == set(GOLDEN)


# Shapes

PAIRS_OF_NETWORKS = {
    "wider and larger teacher": (cnn((6, 8, 10), (8, 4, 2), 0), cnn((8, 16, 24), (16, 8, 4), 1)),
    "larger student": (cnn((6, 8), (9, 6), 0), cnn((8, 16), (8, 4), 1)),
    "teacher with more stages": (cnn((6, 8), (8, 4), 0), cnn((4, 8, 16, 24), (32, 16, 8, 4), 1)),
    "student with more stages": (cnn((4, 6, 8, 10), (16, 8, 4, 2), 0), cnn((8, 16), (4, 2), 1)),
    "no square": (
        Outputs(
            drawn(4, 6, seed=0), drawn(4, 7, seed=1), drawn(4, 7, 3, 6, seed=2), (drawn(4, 7, 3, 6, seed=2),)
        ),
        Outputs(
            drawn(4, 6, seed=3), drawn(4, 9, seed=4), drawn(4, 9, 6, 4, seed=5), (drawn(4, 9, 6, 4, seed=5),)
        ),
    ),
}


@pytest.mark.parametrize("name", ON_MAPS)
@pytest.mark.parametrize("pair", PAIRS_OF_NETWORKS)
def test_maps_of_any_two_shapes_are_matched(name: str, pair: str) -> None:
    """The last map of the student and every adapter get a gradient."""
    student, leaves = learning(PAIRS_OF_NETWORKS[pair][0])
    teacher = PAIRS_OF_NETWORKS[pair][1]
    method = built(name, student, teacher)
    loss = value(method, student, teacher)
    loss.backward()
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert leaves[-1].grad is not None
    assert float(leaves[-1].grad.norm()) > 0
    assert [key for key, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["hcl", "reviewkd", "skt"])
def test_stages_are_paired_from_the_coarsest(name: str) -> None:
    student, leaves = learning(cnn((4, 6, 8), (16, 8, 4), 0))
    teacher = cnn((16, 24), (8, 4), 1)
    value(built(name, student, teacher), student, teacher).backward()
    assert [leaf.grad is not None for leaf in leaves] == [False, True, True]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 5, 6), (4, 5, 10)), ((3, 17, 8), (5, 65, 8)), ((1, 16, 8), (1, 6, 6))]
)
def test_tokens_of_other_widths_and_grids_are_matched(
    name: str, student: tuple[int, int, int], teacher: tuple[int, int, int]
) -> None:
    ours, leaves = learning(vit(*student, seed=0))
    theirs = vit(*teacher, seed=1)
    method = built(name, ours, theirs, **BLOCKS[name])
    loss = value(method, ours, theirs)
    loss.backward()
    assert torch.isfinite(loss)
    assert leaves[-1].grad is not None
    assert float(leaves[-1].grad.norm()) > 0
    assert [key for key, p in method.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["hidden", "trg"])
def test_lengths_that_are_no_grids_are_refused_with_tap_and_shapes(name: str) -> None:
    student, teacher = vit(2, 12, 6, seed=0), vit(2, 65, 10, seed=1)
    with pytest.raises(UnsupportedModelError, match="tap 'tokens'") as caught:
        built(name, student, teacher, **BLOCKS[name])
    assert "(4, 12, 6)" in caught.value.message
    assert "(4, 65, 10)" in caught.value.message


def test_a_student_with_more_blocks_than_the_teacher_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="3 blocks of shape") as caught:
        built("hidden", vit(3, 5, 6, seed=0), vit(2, 5, 6, seed=1))
    assert "tap 'tokens'" in caught.value.message


@pytest.mark.parametrize("name", ["mi", "trg"])
def test_the_tap_of_choice_is_what_the_method_needs(name: str) -> None:
    taps = ("logits", "embedding", "features", "stages", "preactivations")
    refuse_unmet(methods(name), teacher_taps=taps, student_taps=taps, labels=False)
    with pytest.raises(UsageError, match="needs the teacher's tokens"):
        refuse_unmet(
            methods(name, {name: {"on": "tokens"}}), teacher_taps=taps, student_taps=taps, labels=False
        )
    with pytest.raises(UsageError, match="unknown tap of method"):
        methods(name, {name: {"on": "token"}})


# What would break a captured graph


class _Captured(TorchDispatchMode):
    """Refuses what waits for the device, makes a shape of a value, or brings a number to the device."""

    FORBIDDEN = (
        "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise AssertionError(f"{func} in a captured graph")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*ON_MAPS, "hidden", "ccc"])
def test_nothing_waits_for_a_value(name: str) -> None:
    networks = (
        (vit(2, 5, 6, seed=0), vit(4, 5, 10, seed=1))
        if name == "hidden"
        else PAIRS_OF_NETWORKS["larger student"]
    )
    student, _ = learning(networks[0])
    logits = student.logits.requires_grad_()
    method = built(name, student, networks[1])
    step = batch(), context()
    with _Captured():  # type: ignore[no-untyped-call]
        (method(student, networks[1], *step) + 0 * logits.sum()).backward()


@pytest.mark.parametrize("name", ["crd", "mgd", "trg"])
def test_the_draw_is_a_function_of_the_generator(name: str) -> None:
    student, teacher = cnn((8,), (8,), 0), cnn((8,), (8,), 1)
    options: dict[str, dict[str, Any]] = {"trg": {"sampled": 16}, "mgd": {"mask_ratio": 0.5}}
    method = built(name, student, teacher, **options.get(name, {}))
    once, again, other = (
        float(value(copy.deepcopy(method), student, teacher, context(seed=seed)).detach())
        for seed in (3, 3, 4)
    )
    assert once == again
    assert once != other


@pytest.mark.parametrize("name", ["crd", "reviewkd", "mgd", "mi", "semantic"])
def test_adapters_are_a_function_of_the_seed_alone(name: str) -> None:
    student, teacher = PAIRS_OF_NETWORKS["larger student"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(name, student, teacher)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = built(name, student, teacher)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
