"""The networks and sets of `quantize.py`: built, read and trained, on a CUDA device where there is one."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar100 import load_module
from cifar_resnet_padded import PaddedResNet
from torch import Tensor, nn

from edgekd import export
from edgekd.distillers import methods
from edgekd.plan import Plan
from edgekd.quantize.capture import capture
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.tasks.classification import normalise
from edgekd.train import Stage, evaluate, fit
from edgekd.views import CachedTeacher, Views

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RATES = {"residual": 3e-3, "depthwise": 3e-3, "vit": 1e-3}


class Depthwise(nn.Module):
    """MobileNetV2-like: inverted residuals with ReLU6 at 32, 16 and 8 pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        width = 16
        for wider, stride in ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1)):
            layers.append(_Inverted(width, wider, stride))
            width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.adaptive_avg_pool2d(self.body(x), 1).flatten(1))
        return logits


class _Inverted(nn.Module):
    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        middle = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle),
            nn.ReLU6(), nn.Conv2d(middle, wider, 1, bias=False), nn.BatchNorm2d(wider),
        )  # fmt: skip
        self._add = stride == 1 and width == wider

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self._add else y


class SmallViT(nn.Module):
    """8 x 8 patches, width 64, three blocks with four heads, mean over tokens."""

    def __init__(self, classes: int, pixels: int = 32, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, pixels // 8, pixels // 8)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4, tokens: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self._heads, self._tokens = heads, tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)

        def apart(made: Tensor) -> Tensor:
            return made.reshape(-1, self._tokens, self._heads, made.shape[-1] // self._heads).transpose(1, 2)

        query, key, value = (apart(layer(normed)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(-1, self._tokens, x.shape[-1]))
        made: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return made


class Reader(nn.Module):
    """BERT-like: (N, L) word numbers, 0 for padding, which attention leaves out; two blocks of width 64."""

    def __init__(self, words: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.words, self.place = (
            nn.Embedding(words, width),
            nn.Parameter(0.02 * torch.randn(1, length, width)),
        )
        self.start = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Block(width, tokens=length) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        known = (x > 0).float()
        tokens = self.start(self.words(x) + self.place)
        for block in self.blocks:
            tokens = block(tokens, (known[:, None, None] - 1) * 1e4)
        pooled = (tokens * known[..., None]).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


@dataclass(frozen=True)
class Data:
    """uint8 (N, C, H, W) images and int64 labels: those to train on, and the lossless test images."""

    images: Tensor
    labels: Tensor
    test_images: np.ndarray  # (N, H, W, C)
    test_labels: np.ndarray
    spec: ModelSpec


IMAGES = {
    "cifar10": ("cifar10_train_a25k_q95.npz", "cifar10_test.npz"),
    "tinyimagenet20": ("tinyimagenet20_train.npz", "tinyimagenet20_val.npz"),
}
SETS = (*IMAGES, "sst2")


def read(shared: Path, train: int, test: int, images_of: str = "cifar10") -> Data:
    """The first `test` test images, and `train` random training images; 0 is all."""
    load = load_module(shared / "data" / "load_shared.py").images
    images, labels, classes = load(shared / "data" / IMAGES[images_of][0])
    chosen = np.random.default_rng(0).permutation(len(images))[: train or len(images)]
    held, answers, _ = load(shared / "data" / IMAGES[images_of][1])
    test = test or len(held)
    height, width = images.shape[1:3]
    return Data(
        torch.from_numpy(np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2))),
        torch.from_numpy(labels[chosen].astype(np.int64)),
        held[:test],
        answers[:test].astype(np.int64),
        ModelSpec(Preprocessing(height, width, "rgb", *NORMALISATION), tuple(classes)),
    )


def given_residual(shared: Path) -> nn.Module:
    """ResNet-20 for CIFAR-10 with its authors' weights."""
    stored = torch.load(shared / "models" / "cifar10_resnet20_akamaster.pt", weights_only=True)
    stored = stored.get("state_dict", stored)
    model = PaddedResNet(3)
    model.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
    return model.eval()


def network(name: str, data: Data) -> nn.Module:
    """An untrained one."""
    classes = len(data.spec.classes)
    if name == "vit":
        return SmallViT(classes, data.images.shape[2])
    return Depthwise(classes) if name == "depthwise" else PaddedResNet(3, classes)


def stage(
    model: nn.Module, views: Views, labels: Tensor, teacher: CachedTeacher | None, **changed: Any
) -> Stage:
    """One training as the loop takes it: on labels, or on the teacher's logits alone (`kd`)."""
    taught = methods("kd") if teacher is not None else ()
    return replace(
        Stage(
            name="bench", model=model, views=views, labels=labels, teacher=teacher, distillers=taught,
            epochs=1, batch_size=64, learning_rate=3e-3, weight_decay=1e-4, ema_decay=0.99, seed=0,
            plan=Plan(channels_last=False, device=DEVICE), hard_weight=None if taught else 1.0,
        ),
        **changed,
    )  # fmt: skip


def accuracy(model: nn.Module, data: Data) -> float:
    """Top-1 on the test images, 0 to 1."""
    inputs = normalise(
        torch.from_numpy(data.test_images.transpose(0, 3, 1, 2).copy()), data.spec.preprocessing
    )
    logits = evaluate(model.to(DEVICE), inputs)
    model.cpu()
    return float((logits.argmax(1).numpy() == data.test_labels).mean())


def trained(name: str, data: Data, epochs: int, seed: int = 0) -> nn.Module:
    """A network after a training on labels."""
    torch.manual_seed(seed)
    model = network(name, data)
    views = Views(data.images, data.spec.preprocessing, "crop-flip", 0, seed, DEVICE)
    plan = Plan(channels_last=False, device=DEVICE, graphed=DEVICE == "cuda")
    run = stage(
        model, views, data.labels, None, epochs=epochs, batch_size=128, learning_rate=RATES[name], plan=plan,
        seed=seed,
    )  # fmt: skip
    fit(run, lambda *_: None)
    return model.eval()


def write_models(arguments: Namespace) -> list[dict[str, Any]]:
    """`FOLDER/SET/NETWORK.onnx` and `FOLDER/SET/test.npz`; a file that is there stays. Returns accuracies."""
    rows = []
    for images_of in arguments.images:
        names = [name for name in arguments.networks if (name == "text") == (images_of == "sst2")]
        folder = arguments.models / images_of
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = folder / f"{name}.onnx"
            if path.exists():
                print(f"{path} is there", file=sys.stderr)
                continue
            if name == "text":
                rows.append(_write_text(arguments.shared, arguments.epochs, path))
                continue
            data = read(arguments.shared, arguments.train, arguments.test, images_of)
            given = name == "residual" and images_of == "cifar10"
            model = given_residual(arguments.shared) if given else trained(name, data, arguments.epochs)
            np.savez(folder / "test.npz", images=data.test_images, labels=data.test_labels)
            export.save(export.to_onnx(capture(model, data.spec.input_shape), data.spec), path)
            rows.append({"images": images_of, "network": name, "accuracy": accuracy(model, data)})
            rows[-1]["epochs"] = 0 if given else arguments.epochs
            print(rows[-1], file=sys.stderr)
    return rows


def sentences(shared: Path, length: int = 32, words: int = 4000) -> tuple[Tensor, Tensor]:
    """int64 (N, L) numbers of the most frequent words of SST-2, 1 for the others, and labels."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.read_table(shared / "data" / "text_sst2.parquet").to_pydict()
    text = [str(line).lower().split() for line in table["text" if "text" in table else "sentence"]]
    common = Counter(word for line in text for word in line).most_common(words - 2)
    number = {word: index + 2 for index, (word, _) in enumerate(common)}
    rows = [[number.get(word, 1) for word in line[:length]] for line in text]
    padded = [row + [0] * (length - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([int(label) for label in table["label"]])


def _write_text(shared: Path, epochs: int, path: Path) -> dict[str, Any]:
    """Train the reader on four fifths of SST-2, export it, and store the rest as ``test.npz``."""
    words, labels = sentences(shared)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    torch.manual_seed(0)
    model = Reader(4000, words.shape[1]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(
                model(words[part].to(DEVICE)), labels[part].to(DEVICE), label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.cpu().eval()
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(model, (words[:2],), dynamic_shapes=({0: batch},))
    made = torch.onnx.export(
        program, (), dynamo=True, opset_version=export.OPSET, external_data=False, input_names=["words"],
        output_names=["logits"], verbose=False,
    )  # fmt: skip
    assert made is not None
    export.save(made.model_proto, path)
    np.savez(path.with_name("test.npz"), words=words[test].numpy(), labels=labels[test].numpy())
    right = float((model(words[test]).argmax(1) == labels[test]).float().mean())
    return {"images": "sst2", "network": "text", "accuracy": right, "epochs": epochs}
