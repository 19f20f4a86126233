"""Every training-free score, and the values that its authors' code gives."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.nets import Outputs, count_macs, count_parameters, tapped_forward
from edgekd.probing import Activations, block_features, initialise, randomised
from edgekd.proxies import NEEDS, OutputProxy, Trial, check_teacher, proxy, proxy_class, proxy_names
from edgekd.proxies.diswot import classifier_gradient, relation, semantic, to_width

NAMES = proxy_names()
BESIDE_TEACHER = [name for name in NAMES if issubclass(proxy_class(name), OutputProxy)]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def outputs(seed: int, width: int = 12, size: int = 5) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(8, width, size, size, generator=draw)
    embedding = features.mean((2, 3))
    return Outputs(embedding @ torch.randn(width, 4, generator=draw), embedding, features)


def of_outputs(name: str) -> OutputProxy:
    made = proxy(name)
    assert isinstance(made, OutputProxy)
    return made


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


# ---------------------------------------------------------------- every score, of a network


class Small(nn.Module):
    """A residual network with dropout, a functional rectifier in place, and a frozen layer."""

    def __init__(self, width: int = 8, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.drop = nn.Dropout(0.3)
        self.classifier = nn.Linear(2 * width, 4)
        self.stem[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.block(x), inplace=True)
        logits: Tensor = self.classifier(self.drop(torch.relu(self.down(x)).mean((2, 3))))
        return logits


class Dead(nn.Module):
    """Nothing of the image reaches the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.relu(self.conv(x) * 0.0).mean((2, 3)))
        return logits


def network(width: int = 8) -> nn.Module:
    return initialise(Small(width), torch.Generator().manual_seed(3), "kaiming")


def trial(student: nn.Module, seed: int = 0) -> Trial:
    inputs = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    return Trial(student, inputs, LABELS, outputs(2), 4, seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_is_a_function_of_its_trial(name: str) -> None:
    torch.manual_seed(1)
    first = proxy(name).measure(trial(network()))
    torch.manual_seed(2)
    assert proxy(name).measure(trial(network())) == first
    assert first
    assert all(type(value) is float and math.isfinite(value) for value in first.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_score_leaves_the_network_and_the_generator_alone(name: str) -> None:
    student = network().train()
    student.get_submodule("block").eval()
    F.cross_entropy(student(torch.randn(8, 3, 12, 12)), LABELS).backward()
    before = copy.deepcopy(student)
    grads = [parameter.grad for parameter in student.parameters()]
    state = torch.random.get_rng_state()
    proxy(name).measure(trial(student))
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in before.state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key
    assert [p.grad is g for p, g in zip(student.parameters(), grads, strict=True)] == [True] * len(grads)
    for old, new in zip(before.parameters(), student.parameters(), strict=True):
        assert old.requires_grad == new.requires_grad
        assert old.grad is None or (new.grad is not None and torch.equal(old.grad, new.grad))
    assert [m.training for m in before.modules()] == [m.training for m in student.modules()]
    assert not any(m._forward_hooks for m in student.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["fresh", "zero"])
def test_a_dead_network_has_a_finite_score(name: str, weights: str) -> None:
    dead: nn.Module = Dead() if weights == "fresh" else network()
    if weights == "zero":
        for parameter in dead.parameters():
            nn.init.zeros_(parameter)
    found = proxy(name).measure(trial(dead))
    assert all(math.isfinite(value) for value in found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_a_score_needs_no_more_than_it_says(name: str) -> None:
    made = proxy(name)
    assert set(made.needs) <= set(NEEDS)
    full = trial(network())
    full.labels = full.labels if "labels" in made.needs else None
    full.teacher = full.teacher if {"teacher", "embedding"} & set(made.needs) else None
    if "images" not in made.needs:
        full.inputs = torch.full_like(full.inputs, float("nan"))
    assert all(math.isfinite(value) for value in made.measure(full).values())


@pytest.mark.parametrize("name", [name for name in NAMES if proxy_class(name).needs])
def test_a_score_without_what_it_needs_says_so(name: str) -> None:
    bare = trial(network())
    bare.labels, bare.teacher = None, None
    if {"labels", "teacher"} & set(proxy(name).needs):
        with pytest.raises(UsageError):
            proxy(name).measure(bare)


def test_each_score_names_its_source() -> None:
    for name in NAMES:
        module = inspect.getmodule(proxy_class(name))
        assert len((inspect.getdoc(module) or "").splitlines()[0]) > 30


# ---------------------------------------------------------------- every score beside a teacher


@pytest.mark.parametrize("name", BESIDE_TEACHER)
def test_the_same_outputs_have_the_same_score(name: str) -> None:
    scores = [of_outputs(name).terms(outputs(1), outputs(2, 20), LABELS) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]
    assert all(math.isfinite(value) for value in scores[0].values())


@pytest.mark.parametrize("name", BESIDE_TEACHER)
def test_no_student_beats_the_teacher_itself(name: str) -> None:
    teacher = outputs(2)
    best = of_outputs(name).terms(teacher, teacher, LABELS)
    assert all(value == pytest.approx(0, abs=1e-6) for value in best.values())
    for seed in range(3, 8):
        other = of_outputs(name).terms(outputs(seed), teacher, LABELS)
        assert all(other[term] < best[term] for term in best)


@pytest.mark.parametrize("name", BESIDE_TEACHER)
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_dead_student_has_a_finite_score(name: str, value: float) -> None:
    dead = Outputs(torch.zeros(8, 4), torch.full((8, 12), value), torch.full((8, 12, 5, 5), value))
    score = of_outputs(name).terms(dead, outputs(2), LABELS)
    assert all(math.isfinite(part) for part in score.values())


def test_a_black_box_teacher_leaves_terms_of_diswot_out() -> None:
    box = Outputs(outputs(2).logits)
    score = of_outputs("diswot").terms(outputs(1), box, LABELS)
    assert list(score) == ["relation"]
    assert all(math.isfinite(part) for part in score.values())
    assert list(of_outputs("diswot").terms(Outputs(outputs(1).logits), outputs(2), LABELS)) == ["relation"]


@pytest.mark.parametrize("name", ["semantic", "diswot-sum", "nwot+semantic"])
def test_a_score_of_embeddings_refuses_a_black_box(name: str) -> None:
    box = Outputs(outputs(2).logits)
    with pytest.raises(UsageError, match="logits only"):
        check_teacher(name, proxy(name).needs, box)
    check_teacher(name, proxy(name).needs, outputs(2))
    check_teacher("diswot", proxy("diswot").needs, box)


def test_the_sum_of_diswot_is_that_of_its_terms() -> None:
    both = of_outputs("diswot").terms(outputs(1), outputs(2), LABELS)
    alone = [of_outputs(name).terms(outputs(1), outputs(2), LABELS) for name in ("relation", "semantic")]
    assert both == alone[0] | alone[1]
    added = of_outputs("diswot-sum").terms(outputs(1), outputs(2), LABELS)
    assert added == {"diswot-sum": pytest.approx(sum(both.values()))}


def test_relation_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    student = torch.relu(torch.sin(0.3 * integers(4, 8, 4, 4)))
    teacher = torch.relu(torch.cos(0.2 * integers(4, 8, 4, 4)))
    exact = golden["losses"]["diswot_relation"]["value"]
    assert float(relation(student, teacher)) == pytest.approx(exact, rel=2e-4)
    assert exact == -golden["losses"]["sp"]["value"]  # it is the negative of similarity preserving


def test_semantic_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    student, teacher = torch.sin(0.2 * integers(6, 8)), torch.cos(0.3 * integers(6, 8))
    exact = golden["losses"]["diswot_semantic"]["value"]
    assert float(semantic(student, teacher)) == pytest.approx(exact, rel=1e-6)


def test_the_classifiers_gradient_is_that_of_autograd() -> None:
    classifier = nn.Linear(12, 4)
    embedding = outputs(1).embedding
    assert embedding is not None
    logits = classifier(embedding)
    (exact,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), classifier.weight)
    torch.testing.assert_close(classifier_gradient(logits.detach(), embedding, LABELS), exact)


def test_a_projection_to_equal_widths_is_fixed_and_keeps_inner_products() -> None:
    wide = torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    narrow = to_width(wide, 300)
    assert torch.equal(narrow, to_width(wide, 300))
    assert to_width(wide, 400) is wide
    assert float(narrow.square().sum() / wide.square().sum()) == pytest.approx(1, abs=0.05)


def test_taps_are_the_classifiers_input_and_the_last_map() -> None:
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    inputs = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        found = tapped_forward(model, inputs, 4)
    assert found.embedding is not None
    assert found.features is not None
    assert found.embedding.shape == (3, 9)
    assert found.features.shape == (3, 6, 6, 6)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_convolutional_head_gives_logits_and_no_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        found = tapped_forward(model, torch.randn(3, 1, 8, 8), 4)
    assert found.logits.shape == (3, 4)
    assert found.embedding is None


def test_an_unknown_score_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        proxy("diswott")
    assert caught.value.hint == "did you mean 'diswot'?"


# ---------------------------------------------------------------- values by hand


class Plain(nn.Module):
    """A convolution, a rectifier, a classifier: small enough to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.relu(self.conv(x)).mean((2, 3)))
        return logits


def plain_trial() -> Trial:
    student = Plain()
    with torch.no_grad():
        student.conv.weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
        student.classifier.weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 2.0], [-3.0, 0.0]]))
    draw = torch.Generator().manual_seed(0)
    return Trial(student, torch.randn(6, 1, 3, 3, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2]), None, 3)


def loss_of(student: nn.Module, given: Trial) -> Tensor:
    assert given.labels is not None
    return F.cross_entropy(student(given.inputs), given.labels)


def test_gradnorm_snip_and_grasp_are_their_formulas() -> None:
    given = plain_trial()
    weights = [parameter.detach() for parameter in given.student.parameters()]

    def loss(*values: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(given.inputs, values[0])).mean((2, 3))
        assert given.labels is not None
        return F.cross_entropy(maps @ values[1].T, given.labels)

    grads = torch.autograd.functional.jacobian(loss, tuple(weights))
    hessian = torch.autograd.functional.hessian(loss, tuple(weights))
    sizes = [weight.numel() for weight in weights]
    matrix = torch.cat(
        [torch.cat([hessian[i][j].reshape(sizes[i], sizes[j]) for j in range(2)], 1) for i in range(2)]
    )
    flat_w, flat_g = (torch.cat([part.flatten() for part in parts]) for parts in (weights, grads))
    gradnorm = sum(float(gradient.norm()) for gradient in grads)
    assert proxy("gradnorm").measure(given) == {"gradnorm": pytest.approx(gradnorm, rel=1e-5)}
    assert proxy("snip").measure(given) == {
        "snip": pytest.approx(float((flat_w * flat_g).abs().sum()), rel=1e-5)
    }
    expected = -float((flat_w * (matrix @ flat_g)).sum())
    assert proxy("grasp").measure(given) == {"grasp": pytest.approx(expected, rel=1e-4)}


def test_fisher_is_its_formula() -> None:
    given = plain_trial()
    maps = F.conv2d(given.inputs, given.student.get_parameter("conv.weight")).detach().requires_grad_(True)
    logits = (F.relu(maps).mean((2, 3)) @ given.student.get_parameter("classifier.weight").T).detach()
    logits.requires_grad_(True)
    weight = given.student.get_parameter("classifier.weight").detach()
    (to_maps,) = torch.autograd.grad(F.cross_entropy(F.relu(maps).mean((2, 3)) @ weight.T, LABELS6), maps)
    (to_logits,) = torch.autograd.grad(F.cross_entropy(logits, LABELS6), logits)
    total = 0.5 * (maps * to_maps).sum((2, 3)).square().mean(0).sum() + 0.5 * (
        (logits * to_logits).square().mean(0).sum()
    )
    assert proxy("fisher").measure(given) == {"fisher": pytest.approx(float(total.detach()), rel=1e-5)}


LABELS6 = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.LayerNorm([2, 3, 3]), nn.GroupNorm(1, 2)])
def test_synflow_sees_through_norms(norm: nn.Module) -> None:
    layers = [nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(18, 2)]
    for layer in layers:
        for value in layer.parameters():
            nn.init.constant_(value, 0.5)
    plain, normed = nn.Sequential(*layers), nn.Sequential(layers[0], norm, *layers[1:])
    found = [proxy("synflow").measure(Trial(model, torch.zeros(1, 1, 3, 3))) for model in (plain, normed)]
    assert found[0] == found[1]


class _Attention(nn.Module):
    """Tokens of 8 values and their attention, with queries, keys and values of their own."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self._fused = fused

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self._fused:
            made: Tensor = F.scaled_dot_product_attention(query, key, value)
        else:
            made = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, -1) @ value
        return x + made


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("blocks", [2, 14])
def test_synflow_flows_through_the_values_of_attention(fused: bool, blocks: int) -> None:
    """Each block adds its values' product to what enters it: R is a product over blocks. Derivatives of the
    shares would overflow in a few blocks."""
    torch.manual_seed(0)
    body = [_Attention(fused) for _ in range(blocks)]
    stem = nn.Conv2d(1, 8, 3, bias=False)
    model = nn.Sequential(stem, nn.Flatten(2), _Tokens(), *body, nn.Flatten(1))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 3.0)
            nn.init.zeros_(layer.bias)
    given = Trial(model, torch.zeros(1, 1, 5, 5))
    found = proxy("synflow").measure(given)["synflow"]
    grown = 1 + 8 * 3.0  # of every value, a block
    answers = float(stem.weight.detach().abs().sum()) * 9 * grown**blocks  # 9 tokens
    exact = math.log(answers * (1 + blocks * (grown - 1) / grown))
    assert found == pytest.approx(exact, rel=1e-6)
    assert proxy("live-macs").measure(given) == {"live-macs": 9 * 9 * 8 + blocks * 3 * 9 * 64}


class _Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_synflow_of_a_chain_is_the_sum_over_its_paths() -> None:
    given = plain_trial()  # R = sum |w2| |w1| of an image of ones; each of two layers has that saliency
    paths = (torch.tensor([[1.0, 1.0], [0.5, 2.0], [3.0, 0.0]]) * torch.tensor([1.0, 2.0])).sum()
    assert proxy("synflow").measure(given) == {"synflow": pytest.approx(math.log(2 * float(paths)), rel=1e-6)}


def test_nwot_counts_rectifiers_that_agree() -> None:
    given = plain_trial()
    on = F.conv2d(given.inputs, given.student.get_parameter("conv.weight")).flatten(1) > 0
    agree = (on[:, None] == on[None]).sum(2).double()
    _, expected = torch.linalg.slogdet(agree)
    found = proxy("nwot").measure(given)["nwot"]
    singular = float(torch.linalg.eigvalsh(agree)[0]) < 1e-6
    assert singular or found == pytest.approx(float(expected), rel=1e-6)


def test_swap_counts_different_patterns() -> None:
    given = plain_trial()
    on = F.conv2d(given.inputs, given.student.get_parameter("conv.weight")).flatten(1) > 0
    assert proxy("swap").measure(given) == {"swap": float(len(on.T.unique(dim=0)))}


def test_zico_of_two_halves_is_its_formula() -> None:
    given = plain_trial()
    assert given.labels is not None
    halves = []
    for rows in (slice(0, 3), slice(3, 6)):
        logits = given.student(given.inputs[rows])
        loss = F.cross_entropy(logits, given.labels[rows])
        halves.append(torch.autograd.grad(loss, list(given.student.parameters())))
    expected = 0.0
    for first, second in zip(*halves, strict=True):
        spread = (first - second).abs().double() / 2
        mean = (first.abs() + second.abs()).double() / 2
        expected += float((mean[spread > 0] / spread[spread > 0]).sum().log())
    assert proxy("zico").measure(given) == {"zico": pytest.approx(expected, rel=1e-4)}


def test_meco_is_the_least_eigenvalue_of_the_channels_correlation() -> None:
    given = plain_trial()
    given.inputs = torch.randn(2, 1, 8, 8)
    with torch.no_grad():  # channels w and -2w of one image: fully correlated
        assert proxy("meco").measure(given) == {"meco": pytest.approx(0, abs=1e-6)}
    wide = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    trial_of = Trial(wide, torch.zeros(2, 3, 8, 8), classes=4)
    image = trial_of.noise()[:1]
    with torch.no_grad():
        rows = wide[0](image)[0].flatten(1)
    expected = float(torch.linalg.eigvalsh(torch.corrcoef(rows))[0])
    assert proxy("meco").measure(trial_of) == {"meco": pytest.approx(expected, abs=1e-5)}


def test_counts_are_those_of_the_network() -> None:
    student = network()
    assert proxy("params").measure(trial(student)) == {"params": count_parameters(student)}
    macs = count_macs(student, (3, 12, 12))
    assert proxy("macs").measure(trial(student)) == {"macs": macs}
    assert proxy("live-macs").measure(trial(student)) == {"live-macs": macs}
    values = 144 * (8 + 8) + 36 * 16 + 4  # 12 x 12 and 6 x 6 pixels; the classifier's
    assert proxy("activations").measure(trial(student)) == {"activations": values}
    dead = Dead()
    assert proxy("live-macs").measure(trial(dead))["live-macs"] < count_macs(dead, (3, 12, 12))


def test_zen_grows_with_width_and_az_nas_with_expressive_blocks() -> None:
    narrow, wide = (trial(network(width)) for width in (4, 16))
    assert proxy("zen").measure(wide)["zen"] > proxy("zen").measure(narrow)["zen"]
    found = [proxy("az-nas").measure(given) for given in (narrow, wide)]
    assert found[1]["expressivity"] > found[0]["expressivity"]
    assert all(row["trainability"] <= 0 for row in found)
    assert found[0]["complexity"] == count_macs(network(4), (3, 12, 12))


def test_a_block_that_does_nothing_is_the_least_trainable() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.classifier = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            logits: Tensor = self.classifier((x + 0.0 * self.second(x)).mean((2, 3)))
            return logits

    assert (
        proxy("az-nas").measure(trial(Idle()))["trainability"] > -1e5
    )  # its convolution itself does something
    dead = proxy("az-nas").measure(trial(Dead()))
    assert math.isfinite(dead["trainability"])


# ---------------------------------------------------------------- looking into networks


def test_activations_are_seen_as_modules_and_as_functions() -> None:
    seen: list[Tensor] = []
    layers = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Hardswish())
    with torch.no_grad(), Activations(seen.append):
        torch.relu(F.relu(layers(torch.randn(2, 3)), inplace=True))
        torch.sigmoid(torch.ones(2))
    assert len(seen) == 7


def test_block_features_are_what_lies_between_blocks() -> None:
    found = block_features(network(), torch.randn(2, 3, 12, 12))
    assert [tuple(feature.shape) for feature in found] == [(2, 8, 12, 12), (2, 8, 12, 12), (2, 16, 6, 6)]


def test_a_random_teacher_is_a_copy_with_weights_of_its_seed() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (randomised(model, seed) for seed in (0, 0, 1))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    weights = [made.get_parameter("down.weight").detach() for made in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].std()) == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- sums


def test_a_sum_holds_the_terms_of_each_score() -> None:
    whole = proxy("diswot+nwot+params").measure(trial(network()))
    assert list(whole) == ["diswot.relation", "diswot.semantic", "nwot", "params"]
    assert whole["nwot"] == proxy("nwot").measure(trial(network()))["nwot"]
    assert set(proxy("diswot+nwot").needs) == {"images", "labels", "teacher"}


@pytest.mark.parametrize("name", ["nwot+nwot", "nwot+", "nwot+synflw"])
def test_a_malformed_sum_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        proxy(name)
