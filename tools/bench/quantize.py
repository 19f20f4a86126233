"""Quantizers on the same networks, data and runtimes; and what a teacher adds to training at few bits.

    python tools/bench/quantize.py engines --seeds 3
    python tools/bench/quantize.py engines --networks depthwise --images tinyimagenet20 --seeds 1 --qat 3
    python tools/bench/quantize.py bits --bits 4 3

`engines`: post-training, `edgekd quantize MODEL.onnx --compare-engines` for each network and seed (the seed
draws the samples that calibrate, decide and report). `bits`: of the residual network, without training, with
training on labels alone, and with the float network as a teacher; same images, order, rate and epochs.

Expects the CIFAR-10 arrays and the weights of akamaster's ResNet-20 in --shared. Writes a JSON file and
prints Markdown tables. An engine that is not installed, or fails, is a line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
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
from edgekd.quantize.fakequant import calibrate, find_sites, insert, largest_codes
from edgekd.quantize.samples import Pixels
from edgekd.quantize.scheme import scheme_for
from edgekd.run import Silent
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.onnx_choice import Training, Wanted
from edgekd.stages.quantize_file import quantize_file
from edgekd.target import find_target
from edgekd.tasks.classification import normalise
from edgekd.train import Stage, evaluate, fit
from edgekd.views import CachedTeacher, Views

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPEC = ModelSpec(Preprocessing(32, 32, "rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), CLASSES)
PLAN = Plan(channels_last=False)


class Depthwise(nn.Module):
    """MobileNetV2-like: inverted residuals with ReLU6 at 32, 16 and 8 pixels."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
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
    """Patches of 4 pixels, width 64, three blocks with four heads, mean over tokens."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

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


def text_model(arguments: argparse.Namespace, path: Path, samples: Path) -> None:
    """Train the reader on four fifths of SST-2, export it, and store the rest as samples."""
    words, labels = sentences(arguments.shared)
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = Reader(4000, words.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(2 * arguments.epochs):
        for part in train[torch.randperm(len(train))].split(64):
            loss = F.cross_entropy(model(words[part]), labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(model, (words[:2],), dynamic_shapes=({0: batch},))
    made = torch.onnx.export(
        program, (), dynamo=True, opset_version=export.OPSET, external_data=False, input_names=["words"],
        output_names=["logits"], verbose=False,
    )  # fmt: skip
    assert made is not None
    export.save(made.model_proto, path)
    np.savez(samples, words=words[test].numpy(), labels=labels[test].numpy())


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


def read(shared: Path, train: int, test: int, images_of: str = "cifar10") -> Data:
    """The first images of both parts."""
    load = load_module(shared / "data" / "load_shared.py").images
    images, labels, classes = load(shared / "data" / IMAGES[images_of][0])
    chosen = np.random.default_rng(0).permutation(len(images))[:train]
    held, answers, _ = load(shared / "data" / IMAGES[images_of][1])
    return Data(
        torch.from_numpy(np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2))),
        torch.from_numpy(labels[chosen].astype(np.int64)),
        held[:test],
        answers[:test].astype(np.int64),
        ModelSpec(replace(SPEC.preprocessing, height=images.shape[1], width=images.shape[2]), tuple(classes)),
    )


def residual(shared: Path) -> nn.Module:
    """ResNet-20 with its authors' weights."""
    stored = torch.load(shared / "models" / "cifar10_resnet20_akamaster.pt", weights_only=True)
    stored = stored.get("state_dict", stored)
    model = PaddedResNet(3)
    model.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})
    return model.eval()


def trained(model: nn.Module, data: Data, epochs: int) -> nn.Module:
    """`model` after a short training on labels."""
    views = Views(data.images, data.spec.preprocessing, "crop-flip", 0, 0)
    fit(_stage(model, views, data.labels, None, epochs, 3e-3), lambda *_: None)
    return model.eval()


def _stage(
    model: nn.Module,
    views: Views,
    labels: Tensor,
    teacher: CachedTeacher | None,
    epochs: int,
    rate: float,
) -> Stage:
    taught = methods("kd") if teacher is not None else ()
    return Stage(
        name="bench", model=model, views=views, labels=labels, teacher=teacher, distillers=taught,
        epochs=epochs, batch_size=64, learning_rate=rate, weight_decay=1e-4, ema_decay=0.99, seed=0,
        plan=PLAN,
        hard_weight=None if taught else 1.0,
    )  # fmt: skip


def engines(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a network, seed, engine and runtime."""
    data = read(arguments.shared, arguments.train, arguments.test, arguments.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out / "test.npz", images=data.test_images, labels=data.test_labels)
    rows = []
    for name in arguments.networks:
        torch.manual_seed(0)
        path, samples = arguments.out / f"{name}.onnx", arguments.out / "test.npz"
        if name == "text":
            samples = arguments.out / "sentences.npz"
            text_model(arguments, path, samples)
        else:
            made: nn.Module = SmallViT() if name == "vit" else Depthwise(len(data.spec.classes))
            given = name == "residual"
            model = residual(arguments.shared) if given else trained(made, data, arguments.epochs)
            export.save(export.to_onnx(capture(model, data.spec.input_shape), data.spec), path)
        for seed in range(arguments.seeds):
            wanted = Wanted(
                path,
                find_target("x86"),
                str(samples),
                arguments.out / f"{name}-{seed}",
                Pixels(),
                compare_engines=True,
                seed=seed,
                training=Training(arguments.qat) if arguments.qat else None,
            )
            record = quantize_file(wanted, Silent())
            rows += [row | {"network": name, "seed": seed} for row in record["candidates"]]
            print(f"{name} seed {seed}: {record['chosen']}; {record['engines_failed']}", file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds; latency as the ratio to fp32 of the same runtime and session."""
    lines = ["| network | candidate | points lost, mean (each seed) | CPU time / fp32 | int8 MACs |",
             "|---|---|---|---|---|"]  # fmt: skip
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network and row["drop"] is not None]
        for name in dict.fromkeys(row["id"] for row in mine):
            same = [row for row in mine if row["id"] == name and row["cpu_p50_ms"]]
            plain = {
                (row["runtime"], row["seed"]): row["cpu_p50_ms"] for row in mine if row["form"] == "fp32"
            }
            if not same:
                continue
            drops = [row["drop"] for row in same]
            each = ", ".join(f"{drop:.2f}" for drop in drops)
            ratio = statistics.median(row["cpu_p50_ms"] / plain[row["runtime"], row["seed"]] for row in same)
            covered = f"{100 * same[0]['int8_coverage_macs']:.0f} %"
            mean = statistics.mean(drops)
            lines.append(f"| {network} | {name} | {mean:.2f} ({each}) | {ratio:.2f} | {covered} |")
    return "\n".join(lines)


def bits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of the residual network at each number of weight bits, three ways."""
    data = read(arguments.shared, arguments.train, arguments.test)
    graph = capture(residual(arguments.shared), SPEC.input_shape)
    scheme = scheme_for(find_target("x86"))
    sites = find_sites(graph, scheme)
    test = normalise(torch.from_numpy(data.test_images.transpose(0, 3, 1, 2).copy()), SPEC.preprocessing)
    inputs = normalise(data.images[:512], SPEC.preprocessing)
    grids = calibrate(graph, sites, list(inputs.split(128)), scheme, "mse")

    def accuracy(model: nn.Module) -> float:
        return float((evaluate(model, test).argmax(1).numpy() == data.test_labels).mean())

    views = Views(data.images, SPEC.preprocessing, "none", 1, 0)
    teacher = CachedTeacher(lambda images: evaluate(graph, images), views)
    rows = [{"bits": 32, "way": "float", "accuracy": accuracy(graph)}]
    for count in arguments.bits:
        largest = largest_codes(graph, sites, scheme, count, {})
        rows.append({"bits": count, "way": "ptq",
                     "accuracy": accuracy(insert(graph, sites, grids, scheme, largest))})  # fmt: skip
        print(rows[-1], file=sys.stderr)
        for way, taught in (("qat, labels", None), ("qat, teacher", teacher)):
            torch.manual_seed(0)
            model = insert(graph, sites, grids, scheme, largest)
            fit(_stage(model, views, data.labels, taught, arguments.epochs, arguments.rate), lambda *_: None)
            rows.append({"bits": count, "way": way, "accuracy": accuracy(model)})
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Run one of the two and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["engines", "bits"])
    parser.add_argument("--shared", type=Path, default=Path("shared"), help="folder with data/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quantize"))
    parser.add_argument("--networks", nargs="+", default=["residual", "depthwise", "vit", "text"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--train", type=int, default=10000, help="training images")
    parser.add_argument("--test", type=int, default=3000, help="test images")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--qat", type=int, default=0, help="passes of `edgekd quantize --qat`; 0 is none")
    parser.add_argument(
        "--images", choices=IMAGES, default="cifar10", help="which set; weights are of cifar10"
    )
    parser.add_argument(
        "--rate", type=float, default=5e-4, help="learning rate of quantization-aware training"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, cpu = time.time(), time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = engines(arguments) if arguments.what == "engines" else bits(arguments)
    (arguments.out / f"{arguments.what}.json").write_text(json.dumps(rows, indent=1, default=str))
    if arguments.what == "engines":
        print(table(rows))
    else:
        print("| weight bits | way | accuracy |\n|---|---|---|")
        for row in rows:
            print(f"| {row['bits']} | {row['way']} | {100 * row['accuracy']:.2f} |")
    spent = f"{time.time() - started:.0f} s, {time.process_time() - cpu:.0f} CPU-s"
    print(f"\n{spent} without those of the measuring processes, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
