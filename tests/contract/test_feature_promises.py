"""What the formulas of CRD, ReviewKD, MGD, CWD, MI-alpha, TRG, SKT, DisWOT and hidden states promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from example_outputs import INPUTS, built, cnn, context, drawn, integers, learning, only_map, value, vit
from torch import Tensor

from edgekd.distillers.ccc import ccc
from edgekd.distillers.cwd import cwd_loss
from edgekd.distillers.mi import mi_bound
from edgekd.distillers.relation import relation_loss
from edgekd.distillers.reviewkd import Fusion, hcl_loss
from edgekd.distillers.semantic import classifier_gradient, semantic_loss
from edgekd.distillers.skt import cosine_loss, flow
from edgekd.distillers.trg import global_loss, inner_loss, local_loss
from edgekd.tokens import paired_blocks, positions, same_length

# ReviewKD


def test_reviewkd_hands_coarse_levels_down_to_fine_ones() -> None:
    student, leaves = learning(cnn((6, 8), (8, 4), 0))
    teacher = cnn((16, 24), (8, 4), 1)
    method = built("reviewkd", student, teacher)
    levels = method._levels(student, teacher)
    fused = None
    for fusion, (ours, _) in zip(method.fusions, levels, strict=True):
        out, fused = fusion(ours, fused)
    out.square().sum().backward()
    assert out.shape == (4, 16, 8, 8)
    assert all(leaf.grad is not None and float(leaf.grad.norm()) > 0 for leaf in leaves)


def test_reviewkd_mixes_a_level_with_the_enlarged_coarser_one() -> None:
    """With attention weights of zero both shares are sigmoid(bias)."""
    fusion = Fusion(6, 5, 7, fuse=True)
    assert fusion.attention is not None
    assert fusion.attention.bias is not None
    with torch.no_grad():
        fusion.attention.weight.zero_()
        fusion.attention.bias.copy_(torch.tensor([1.0, -2.0]))
    own, coarser = drawn(4, 6, 8, 8, seed=0), drawn(4, 5, 4, 4, seed=1)
    out, fused = fusion(own, coarser)
    shares = torch.sigmoid(torch.tensor([1.0, -2.0]))
    enlarged = coarser.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(fused, shares[0] * fusion.reduce(own) + shares[1] * enlarged, atol=1e-6)
    assert torch.allclose(out, fusion.expand(fused), atol=1e-5)


def test_reviewkd_bounds_the_width_of_its_fusion() -> None:
    student, teacher = cnn((6, 8), (8, 4), 0), cnn((16, 24), (8, 4), 1)
    assert [f.reduce[0].out_channels for f in built("reviewkd", student, teacher, middle=5).fusions] == [
        5
    ] * 3
    assert [f.reduce[0].out_channels for f in built("reviewkd", student, teacher).fusions] == [8] * 3


def test_reviewkd_starts_slowly() -> None:
    student, teacher = cnn((6, 8), (8, 4), 0), cnn((16, 24), (8, 4), 1)
    method = built("reviewkd", student, teacher, warmup_epochs=4)
    values = [float(value(method, student, teacher, context(10 * epoch)).detach()) for epoch in range(6)]
    assert [round(one / values[-1], 5) for one in values] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_hcl_of_one_position_is_the_square_error() -> None:
    a, b = drawn(3, 4, 1, 1, seed=0), drawn(3, 4, 1, 1, seed=1)
    assert torch.equal(hcl_loss(a, b), F.mse_loss(a, b))


# MGD, CWD


@pytest.mark.parametrize(("spatial", "shape"), [(False, (64, 8, 1, 1)), (True, (64, 1, 4, 4))])
def test_mgd_masks_channels_or_positions_at_its_ratio(spatial: bool, shape: tuple[int, ...]) -> None:
    networks = cnn((8,), (4,), 0, images=64), cnn((8,), (4,), 1, images=64)
    method = built("mgd", *networks, mask_ratio=0.3, spatial=spatial)
    mask = method._mask(networks[0].features, context())
    assert mask.shape == shape
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(0.7, abs=0.06)


def test_mgd_with_everything_masked_sees_nothing_of_the_student() -> None:
    teacher = cnn((8,), (4,), 1)
    method = built("mgd", cnn((8,), (4,), 0), teacher, mask_ratio=1.0)
    first, second = (value(method, cnn((8,), (4,), seed), teacher) for seed in (0, 5))
    assert torch.equal(first, second)


def test_cwd_is_blind_to_a_constant_added_to_a_channel() -> None:
    student, teacher = INPUTS["fs"], INPUTS["ft"]
    shifted = student + torch.arange(8.0)[None, :, None, None]
    exact = float(cwd_loss(student, teacher, 4.0))
    assert float(cwd_loss(shifted, teacher, 4.0)) == pytest.approx(exact, rel=1e-9)


def test_cwd_tends_to_matching_centred_channels() -> None:
    student, teacher = INPUTS["fs"], INPUTS["ft"]
    gap = (student - student.mean((2, 3), keepdim=True)) - (teacher - teacher.mean((2, 3), keepdim=True))
    limit = float(gap.square().sum((2, 3)).mean()) / (2 * 16)
    assert float(cwd_loss(student, teacher, 300.0)) == pytest.approx(limit, rel=1e-2)


# MI-alpha


def test_the_bound_is_the_formula_written_out() -> None:
    scores, baseline = 3 * INPUTS["sc"], INPUTS["lb"]
    a = torch.sigmoid(torch.tensor(0.9, dtype=torch.float64))
    n = len(scores)

    def mixed(i: int, j: int) -> Tensor:
        others = torch.stack([scores[i, k].exp() for k in range(n) if k != j]).mean()
        return (a * others + (1 - a) * baseline[i].exp()).log()

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    joint = torch.stack([scores[i, i] - mixed(i, j) for i, j in pairs]).mean()
    marginal = torch.stack([(scores[i, j] - mixed(i, i)).exp() for i, j in pairs]).mean()
    assert float(mi_bound(scores, baseline, 0.9)) == pytest.approx(float(1 + joint - marginal), rel=1e-9)


def test_the_bound_rises_with_correlated_inputs_and_stays_below_log_n() -> None:
    states = drawn(16, 8, seed=0)
    states = states / states.norm(dim=1, keepdim=True)
    apart, bound = torch.roll(states, 1, 0), torch.zeros(16)
    values = [float(mi_bound(10 * states @ t.T, bound, 5.0)) for t in (apart, states)]
    assert values[0] < values[1] <= math.log(16)


def test_the_bound_is_finite_when_one_score_is_far_above_the_rest() -> None:
    scores = (1e4 * torch.eye(4)).requires_grad_()
    bound = mi_bound(scores, torch.zeros(4), 0.9)
    bound.backward()
    assert torch.isfinite(bound)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_mi_sums_over_the_pairs_of_its_tap() -> None:
    student, teacher = cnn((6, 8), (8, 4), 0), cnn((4, 8, 16, 24), (32, 16, 8, 4), 1)
    assert len(built("mi", student, teacher).critics) == 1
    method = built("mi", student, teacher, on="stages")
    parts = [
        -critic(*pair, 0.9)
        for critic, pair in zip(method.critics, method._states(student, teacher), strict=True)
    ]
    assert len(parts) == 2
    assert torch.allclose(value(method, student, teacher), parts[0] + parts[1])


# TRG


def test_trg_graphs_are_zero_at_identity_and_its_contrast_is_not() -> None:
    tokens = INPUTS["tok_t"]
    assert float(inner_loss(tokens[None], tokens[None])) == 0
    assert float(local_loss(tokens, tokens, 2, 1.0)) == pytest.approx(0, abs=1e-12)
    assert float(global_loss(tokens, tokens, 0.1)) > 0


def test_trg_sharpens_its_contrast_over_training() -> None:
    student, teacher = cnn((8,), (4,), 0), cnn((8,), (4,), 1)
    method = built("trg", student, teacher, inner=0.0, local=0.0, contrast=1.0, temperature=0.01)
    ours, theirs = (positions(m).flatten(0, 1) for m in (student.stages[0], teacher.stages[0]))
    for step, temperature in ((0, 1.0), (50, 0.1), (100, 0.01), (200, 0.01)):
        expected = float(global_loss(ours, theirs, temperature))
        assert float(value(method, student, teacher, context(step))) == pytest.approx(expected, rel=1e-4)


def test_trg_takes_the_same_tokens_of_both_and_as_many_of_each_image() -> None:
    student, teacher = cnn((8,), (8,), 0), cnn((8,), (8,), 1)
    method = built("trg", student, teacher, sampled=12)
    numbers = torch.arange(4 * 64.0).reshape(4, 64, 1)
    ours, theirs = method._sample((numbers, -numbers), context())
    assert torch.equal(ours, -theirs)
    assert len(set(ours.flatten().tolist())) == 12
    assert [(ours // 64 == image).sum().item() for image in range(4)] == [3] * 4


# SKT


def test_skt_takes_every_sample_of_the_batch() -> None:
    student, teacher = cnn((6, 8), (8, 4), 0), cnn((6, 8), (8, 4), 1)
    method = built("skt", student, teacher, cosine=0.0)
    ours, leaves = learning(student)
    value(method, ours, teacher).backward()
    assert leaves[0].grad is not None
    assert (leaves[0].grad.flatten(1).norm(dim=1) > 0).all()


def test_skt_ignores_the_length_of_a_position_and_is_zero_where_both_are_silent() -> None:
    teacher = INPUTS["ft"].clone()
    teacher[:, :, 0, 0] = 0
    assert float(cosine_loss(7 * teacher, teacher)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_loss(-teacher, teacher)) == pytest.approx(2 * 15 / 16)


def test_skt_adds_flows_of_every_two_stages() -> None:
    student, teacher = cnn((6, 8, 10), (16, 8, 4), 0), cnn((6, 8, 10), (16, 8, 4), 1)
    method = built("skt", student, teacher, cosine=0.0, fsp=1.0)
    expected = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        flows = [
            flow(F.max_pool2d(o.stages[i], 4 // 2**i), F.max_pool2d(o.stages[j], 4 // 2**j))
            for o in (student, teacher)
        ]
        expected += float(F.mse_loss(flows[0], flows[1]))
    assert float(value(method, student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_skt_can_reach_a_teacher_with_negative_values() -> None:
    student = cnn((6,), (8,), 0)
    signed = only_map(drawn(4, 9, 8, 8, seed=1))
    with torch.no_grad():
        free = built("skt", student, signed).adapters[0](student.stages[0])
        kept = built("skt", student, only_map(signed.stages[0].relu())).adapters[0](student.stages[0])
    assert float(free.min()) < 0 == float(kept.min())


# DisWOT's similarities


def test_relation_is_blind_to_scale_and_couples_the_batch_by_one_half() -> None:
    student, teacher = INPUTS["fs"], INPUTS["ft"]
    once = float(relation_loss(student, teacher))
    assert float(relation_loss(5 * student, teacher)) == pytest.approx(once, rel=1e-9)
    repeated = relation_loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    assert float(repeated) == pytest.approx(once / 2, rel=1e-9)


def test_the_classifier_gradient_is_what_autograd_gives() -> None:
    embedding, labels = INPUTS["es"], torch.tensor([0, 3, 5, 2])
    weight = torch.sin(integers(6, 8)).requires_grad_()
    logits = embedding @ weight.T
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), weight)
    assert torch.allclose(classifier_gradient(logits.detach(), embedding, labels), expected, atol=1e-12)


def test_the_closed_form_of_semantics_is_the_matrices_difference() -> None:
    """Also where entries are zero."""
    student, teacher = INPUTS["gs_grad"].clone(), INPUTS["gt_grad"].clone()
    student[0, :3], teacher[1, 2:] = 0, 0
    grams = [F.normalize(w[:, :, None] * w[:, None, :], dim=2) for w in (student, teacher)]
    expected = float((grams[0] - grams[1]).square().sum()) / student.numel()
    assert float(semantic_loss(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_semantics_reach_the_student_through_logits_and_embedding() -> None:
    student, teacher = cnn((8,), (4,), 0), cnn((12,), (4,), 1)
    ours, leaves = learning(student)
    ours.logits.requires_grad_()
    value(built("semantic", ours, teacher), ours, teacher).backward()
    assert ours.logits.grad is not None
    assert leaves[0].grad is not None
    assert min(float(ours.logits.grad.norm()), float(leaves[0].grad.norm())) > 0


# Hidden states


def test_blocks_are_spread_over_the_teacher_and_end_with_its_last() -> None:
    def numbered(blocks: int) -> list[Tensor]:
        return [torch.full((1, 4, 2), float(i + 1)) for i in range(blocks)]

    def chosen(ours: int, theirs: int) -> list[int]:
        return [int(t[0, 0, 0]) for _, t in paired_blocks(numbered(ours), numbered(theirs))]

    assert chosen(4, 12) == [3, 6, 9, 12]
    assert chosen(3, 5) == [1, 3, 5]
    assert chosen(2, 2) == [1, 2]


def test_finer_grids_are_pooled_and_other_tokens_left_out() -> None:
    fine = torch.arange(16.0).reshape(1, 16, 1)
    coarse = torch.cat([torch.full((1, 1, 1), 99.0), torch.zeros(1, 4, 1)], 1)
    ours, theirs = same_length(fine, coarse)
    assert ours.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert theirs.flatten().tolist() == [0.0] * 4


def test_hidden_is_the_sum_over_blocks_through_one_matrix() -> None:
    student, teacher = vit(2, 5, 6, seed=0), vit(4, 5, 10, seed=1)
    method = built("hidden", student, teacher)
    expected = sum(
        float(F.mse_loss(student.tokens[i] @ method.adapter.weight.T, teacher.tokens[2 * i + 1]).detach())
        for i in range(2)
    )
    assert float(value(method, student, teacher).detach()) == pytest.approx(expected, rel=1e-5)
    assert [tuple(p.shape) for p in method.parameters()] == [(10, 6)]


# Concordance


def test_concordance_counts_scale_and_offset() -> None:
    teacher = INPUTS["es"]
    assert ccc(teacher, teacher).tolist() == pytest.approx([1.0] * 8)
    for changed in (2 * teacher, teacher + 1, -teacher):
        assert float(ccc(changed, teacher).max()) < 0.99
    assert float(ccc(torch.full((4, 1), 3.0), torch.full((4, 1), 3.0))) == 1.0
