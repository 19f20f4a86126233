"""Taps show what a network computes, wherever it computes it, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.demo import DemoTeacher
from edgekd.errors import UnsupportedModelError
from edgekd.nets import Outputs
from edgekd.quantize.capture import capture
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.taps import TAPS, Layout, Tapped, find_layout

CLASSES = 7
EVERYTHING = [tap for tap in TAPS if tap != "tokens"]


class Block(nn.Module):
    """Convolution, batch norm, shortcut, and a rectifier of the kind that is asked for."""

    def __init__(self, before: int, after: int, stride: int, rectify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride)
        self.rectify = rectify

    def forward(self, x: Tensor) -> Tensor:
        return self.rectify(self.norm(self.conv(x)) + self.skip(x))


class ResNet(nn.Module):
    """Stem, three stages and a classifier, the blocks in lists as in torchvision."""

    def __init__(self, rectify: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1, rectify), Block(8, 8, 1, rectify))
        self.layer2 = nn.Sequential(Block(8, 12, 2, rectify), Block(12, 12, 1, rectify))
        self.layer3 = nn.Sequential(Block(12, 16, 2, rectify))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(self.dropout(torch.flatten(self.pool(y), 1)))
        return logits


class Attention(nn.Module):
    """One head, written out, with its attention as the 4-D output of a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        attention = self.drop(torch.softmax(q @ k.transpose(1, 2), -1)[:, None])[:, 0]
        mixed: Tensor = attention @ v
        return mixed


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        y: Tensor = x + self.mlp(x)
        return y


class Vit(nn.Module):
    """A patch embedding, three blocks, and a classifier on the mean token."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(TokenBlock(width) for _ in range(3)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class SharedRelu(nn.Module):
    """One rectifier module runs at every resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1)
        self.conv2 = nn.Conv2d(4, 6, 3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv2(self.relu(self.conv1(x))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(3))


def seeded(build: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args).eval()


def test_a_stage_is_the_last_map_of_each_resolution() -> None:
    layout = find_layout(seeded(ResNet), images(), CLASSES)
    assert layout == Layout(
        "fc", ("layer1", "layer2", "layer3"), (), ((8, 16, 16), (12, 8, 8), (16, 4, 4)), True
    )
    assert layout.taps == ("logits", "embedding", "features", "stages", "preactivations")


def test_the_demo_teacher_has_three_stages() -> None:
    layout = find_layout(DemoTeacher(), images(28, 1), 10)
    assert layout.stages == ("features.4", "features.6", "features")
    assert layout.shapes == ((32, 28, 28), (64, 14, 14), (128, 7, 7))
    assert layout.classifier == "classifier"


@pytest.mark.parametrize("head", [0, 1])
def test_a_student_of_the_space_has_the_head_convolution_in_its_last_stage(head: int) -> None:
    spec = ModelSpec(Preprocessing(28, 28, "rgb", (0.0,) * 3, (1.0,) * 3), tuple("abcdefg"))
    space = search_space("mobile-cnn", spec, 8, (3,))
    genome = (1, 0, *(1, 0, 0, 0, 0), *(0, 0, 1, 0, 0), *(0, 0, 0, 0, 0), head)
    student = space.build(genome, torch.Generator().manual_seed(0))
    layout = find_layout(student, images(28), CLASSES)
    widths = [layer.channels_out for layer in space.layers(genome)]
    assert [shape[1] for shape in layout.shapes] == [28, 14, 7]
    assert layout.shapes[-1][0] == widths[-2]  # what the pooling reads
    assert layout.stages[-1] == "features"
    assert layout.ends_in_classifier


def test_a_transformer_gives_tokens_and_no_maps() -> None:
    """Neither the patch embedding nor the attention is a stage."""
    layout = find_layout(seeded(Vit), images(), CLASSES)
    assert layout.tokens == ("blocks.0", "blocks.1", "blocks.2")
    assert layout.stages == ()
    assert layout.taps == ("logits", "embedding", "tokens")
    outputs = Tapped(seeded(Vit), layout, ("tokens", "embedding"))(images())
    assert [tuple(t.shape) for t in outputs.tokens] == [(4, 16, 12)] * 3
    assert outputs.embedding is not None
    assert torch.equal(outputs.tokens[-1].mean(1), outputs.embedding)


def test_maps_after_tokens_are_stages() -> None:
    class Hybrid(Vit):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.patches(x)
            tokens = self.blocks(maps.flatten(2).transpose(1, 2)).transpose(1, 2)
            logits: Tensor = self.head(self.last(tokens.unflatten(2, maps.shape[2:])).mean((2, 3)))
            return logits

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(12, 12, 3, 2, 1)

    layout = find_layout(seeded(Hybrid), images(), CLASSES)
    assert layout.stages == ("patches", "last")
    assert layout.tokens == ("blocks.0", "blocks.1", "blocks.2")


def test_channels_last_maps_are_no_stages() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 24, 4, 4)
            self.norm = nn.LayerNorm(24)
            self.fc = nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))
            return logits

    assert find_layout(seeded(Swapped), images(), CLASSES).stages == ("conv",)


def test_a_wide_image_keeps_its_stages() -> None:
    wide = torch.randn(2, 3, 12, 30)
    layout = find_layout(seeded(ResNet), wide, CLASSES)
    assert layout.shapes == ((8, 12, 30), (12, 6, 15), (16, 3, 8))


def test_a_convolutional_head_leaves_no_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(3, CLASSES, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layout = find_layout(model, images(), CLASSES)
    assert layout.classifier is None
    assert "embedding" not in layout.taps
    assert not layout.ends_in_classifier


def test_what_follows_the_classifier_is_noticed() -> None:
    class LogProbabilities(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return F.log_softmax(super().forward(x), 1)

    layout = find_layout(seeded(LogProbabilities), images(), CLASSES)
    assert layout.classifier == "fc"
    assert not layout.ends_in_classifier


def test_stages_can_be_named() -> None:
    model = seeded(ResNet)
    layout = find_layout(model, images(), CLASSES, ("layer1.0", "layer2.1.skip"))
    assert layout.stages == ("layer1.0", "layer2.1.skip")
    outputs = Tapped(model, layout, ("stages",))(images())
    first = model.get_submodule("layer1.0")(model.get_submodule("stem")(images()))
    assert torch.equal(outputs.stages[0], first)
    assert outputs.features is outputs.stages[1]


def test_a_path_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match="tap 'layer9'") as caught:
        find_layout(seeded(ResNet), images(), CLASSES, ("layer9",))
    assert {"layer1", "layer2", "layer3"} == set(caught.value.hint.removeprefix("nearest: ").split(", "))
    with pytest.raises(UnsupportedModelError) as caught:
        find_layout(nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)), images(), CLASSES, ("0",))
    assert caught.value.hint == "this network has no 4-D maps"


def test_looking_changes_nothing() -> None:
    model = seeded(ResNet).train()
    model.get_submodule("layer1").eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    find_layout(model, images(), CLASSES)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_failed_look_leaves_no_hooks() -> None:
    model = seeded(ResNet).train()
    with pytest.raises(RuntimeError):
        find_layout(model, images(16, 1), CLASSES)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def tapped(model: nn.Module, *wanted: str) -> Tapped:
    return Tapped(model, find_layout(model, images(), CLASSES), wanted)


def test_taps_are_the_tensors_of_the_pass() -> None:
    model = seeded(ResNet)
    network, x = tapped(model, *EVERYTHING), images()
    outputs = network(x)
    maps = [model.get_submodule("stem")(x)]
    for name in ("layer1", "layer2", "layer3"):
        maps.append(model.get_submodule(name)(maps[-1]))
    assert all(torch.equal(a, b) for a, b in zip(outputs.stages, maps[1:], strict=True))
    assert outputs.features is outputs.stages[-1]
    assert outputs.embedding is not None
    assert torch.equal(outputs.embedding, maps[-1].mean((2, 3)))
    assert torch.equal(outputs.logits, model(x))


def test_only_what_is_wanted_is_kept() -> None:
    outputs = tapped(seeded(ResNet), "embedding")(images())
    assert outputs == Outputs(outputs.logits, outputs.embedding)
    assert tapped(seeded(ResNet))(images()).embedding is None


def test_what_a_network_does_not_give_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="gives no tokens"):
        tapped(seeded(ResNet), "tokens")


RECTIFIERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "torch.relu": lambda: torch.relu,
    "torch.relu_": lambda: torch.relu_,
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda: lambda x: F.relu(x, True),
    "method": lambda: Tensor.relu,
    "method in place": lambda: Tensor.relu_,
    "method in place, result unused": lambda: lambda x: (x.relu_(), x)[1],
    "module": nn.ReLU,
    "module in place": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: F.relu6,
    "module relu6": nn.ReLU6,
    "module relu6 in place": lambda: nn.ReLU6(inplace=True),
}


@pytest.mark.parametrize("kind", RECTIFIERS)
@pytest.mark.parametrize("training", [False, True])
def test_preactivations_are_what_the_last_rectifier_was_given(kind: str, training: bool) -> None:
    """Checked against the same network that does not rectify the ends of its stages."""
    model = seeded(ResNet, RECTIFIERS[kind]()).train(training)
    plain = copy.deepcopy(model)
    x = images()
    network = tapped(model, "preactivations", "logits")
    outputs = network(x)
    limit = 6.0 if "relu6" in kind else float("inf")
    for map_, before in zip(outputs.stages, outputs.preactivations, strict=True):
        assert float(before.detach().min()) < 0
        assert torch.equal(map_, before.clamp(0, limit))
    plain.get_submodule("layer1.1").rectify = nn.Identity()
    exact = plain.get_submodule("layer1")(plain.get_submodule("stem")(x))
    assert torch.equal(outputs.preactivations[0], exact)


@pytest.mark.parametrize("kind", RECTIFIERS)
def test_gradients_flow_through_preactivations_and_past_them(kind: str) -> None:
    rectify = RECTIFIERS[kind]()
    x = torch.linspace(-8, 9, 4 * 3 * 16 * 16).view(4, 3, 16, 16)

    def gradient(want: str) -> list[Tensor]:
        model = seeded(ResNet, rectify)
        outputs = tapped(model, want)(x)
        total = outputs.logits.sum() + sum(p.square().sum() for p in outputs.preactivations)
        return list(torch.autograd.grad(total, list(model.parameters())[:2]))

    plain, both = gradient("logits"), gradient("preactivations")
    assert all(float(a.norm()) > 0 for a in plain)
    assert all(float((a - b).norm()) > 0 for a, b in zip(plain, both, strict=True))


@pytest.mark.parametrize("kind", RECTIFIERS)
def test_asking_for_preactivations_changes_no_result_and_no_gradient(kind: str) -> None:
    results = []
    for wanted in ("logits", "preactivations"):
        model = seeded(ResNet, RECTIFIERS[kind]()).train()
        torch.manual_seed(0)  # dropout
        logits = tapped(model, wanted)(images()).logits
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_map_that_no_rectifier_made_is_its_own_preactivation() -> None:
    """Many rectified tensors have died by then, and others may lie at their addresses."""
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU()]
    model = nn.Sequential(
        nn.Sequential(*layers, nn.Conv2d(3, 3, 3, 1, 1)), nn.Flatten(), nn.Linear(768, CLASSES)
    )
    with torch.no_grad():
        outputs = tapped(model, "preactivations")(images())
    assert outputs.preactivations[0] is outputs.stages[0]


def test_a_module_that_runs_twice_gives_each_of_its_runs() -> None:
    model = seeded(SharedRelu)
    layout = find_layout(model, images(), CLASSES)
    assert layout.stages == ("relu", "relu@2")
    assert layout.shapes == ((4, 16, 16), (6, 8, 8))
    outputs = Tapped(model, layout, ("stages", "preactivations"))(images())
    assert [m.shape[1] for m in outputs.stages] == [4, 6]
    assert all(torch.equal(m, p.relu()) for m, p in zip(outputs.stages, outputs.preactivations, strict=True))


def test_a_pass_leaves_nothing_alive() -> None:
    network = tapped(seeded(ResNet), *EVERYTHING)
    network(images())
    record = network._record
    assert (record.open, record.tensors, record.before, record.rectified) == (False, {}, {}, None)
    with pytest.raises(RuntimeError):
        network(images(16, 1))
    assert not record.open
    network.model(images())  # the hooks sleep when the network runs alone
    assert record.tensors == {}


def test_deploy_gives_the_network_without_hooks_and_tapping_can_go_on() -> None:
    model = seeded(ResNet)
    model.get_submodule("stem").register_forward_hook(lambda *_: None)  # the user's own stays
    network = tapped(model, "stages", "embedding")
    before = network(images())
    assert network.deploy() is model
    assert [name for name, m in model.named_modules() if m._forward_hooks] == ["stem"]
    after = network(images())
    assert torch.equal(before.stages[1], after.stages[1])
    assert len(after.stages) == 3


def test_a_copy_taps_itself_and_not_its_model() -> None:
    network = tapped(seeded(ResNet), "stages", "embedding")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        next(twin.model.parameters()).mul_(2)
    ours, theirs = network(images()), twin(images())
    assert len(theirs.stages) == 3
    assert not torch.equal(ours.stages[0], theirs.stages[0])
    twin.deploy()
    assert not any(m._forward_hooks for m in twin.model.modules())
    assert torch.equal(network(images()).stages[0], ours.stages[0])


def test_two_tappings_of_one_network_do_not_meet() -> None:
    model = seeded(ResNet)
    first, second = tapped(model, "stages"), tapped(model, "embedding")
    assert second(images()).stages == ()
    assert len(first(images()).stages) == 3
    first.deploy()
    assert second(images()).embedding is not None


@pytest.mark.slow
def test_a_tapped_network_can_still_be_captured() -> None:
    """The hooks leave no operator in the graph."""
    model = seeded(ResNet)
    plain = [str(node.target) for node in capture(seeded(ResNet), (3, 16, 16)).graph.nodes]
    tapped(model, *EVERYTHING)
    assert [str(node.target) for node in capture(model, (3, 16, 16)).graph.nodes] == plain


@pytest.mark.slow
def test_a_compiled_pass_gives_the_same_taps() -> None:
    network = tapped(seeded(ResNet), "stages", "embedding")
    exact = network(images())
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for _ in range(2):
        outputs: Outputs = compiled(images())
        assert torch.equal(outputs.logits, exact.logits)
        assert torch.equal(outputs.stages[1], exact.stages[1])
        assert outputs.embedding is not None


def test_modules_can_be_replaced_under_the_taps() -> None:
    network = tapped(seeded(ResNet), "embedding", "stages")
    embedding = network(images()).embedding
    head = nn.Linear(16, 5)
    changed = network.changed(network.layout, {"fc": head})
    outputs = changed(images())
    assert torch.equal(outputs.logits, head(embedding))
    assert outputs.embedding is not None
    assert torch.equal(outputs.embedding, embedding)
    assert not any(m._forward_hooks for m in changed.deploy().modules())


def test_the_first_of_a_tuple_is_tapped() -> None:
    class Paired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = TokenBlock(12)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.block(x), None

    class Old(Vit):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Paired() for _ in range(3))  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            for block in self.blocks:
                tokens = block(tokens)[0]
            logits: Tensor = self.head(tokens.mean(1))
            return logits

    network = tapped(seeded(Old), "tokens")
    assert network.layout.tokens == ("blocks.0", "blocks.1", "blocks.2")
    assert [tuple(t.shape) for t in network(images()).tokens] == [(4, 16, 12)] * 3
