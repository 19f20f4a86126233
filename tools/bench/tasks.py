"""Two small tasks with teachers, as files that `edgekd search` and `edgekd compress` read.

    python tools/bench/tasks.py --data DATA --models MODELS --out TASKS
    PYTHONPATH=tools/bench edgekd search --recipe TASKS/cifar10.toml --target x86 --out RUN
    python tools/bench/search_vs_random.py --run RUN --epochs 30 --seeds 0 1 2

DATA holds cifar10_train_a25k_q95.npz, cifar10_test.npz, tinyimagenet20_{train,val}.npz and load_shared.py;
MODELS holds cifar10_resnet20_akamaster.pt. cifar10: 25,000 training images of 32 pixels, a published
ResNet-20. tiny20: 10,000 of 64 pixels in 20 classes, and a ResNet of 14 layers that is trained here from
labels, in a minute on a GPU (`--epochs`, one seed). The test images of both are the validation images of the
runs; `search` and `distill` hold out training images of their own to choose by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from cifar_resnet_padded import PaddedResNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainings import read_images

from edgekd.blocks import Block, conv_norm, with_weights
from edgekd.plan import Plan
from edgekd.spec import Preprocessing
from edgekd.tasks.classification import normalise
from edgekd.train import Stage, evaluate, fit
from edgekd.views import Views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTHS = (64, 128, 256)


def cifar10_teacher() -> nn.Module:
    """ResNet-20, 41 MMACs."""
    return PaddedResNet(3)


def tiny20_teacher() -> nn.Module:
    """A ResNet of two blocks a stage with 64, 128 and 256 channels behind a strided stem, 417 MMACs."""
    body: list[nn.Module] = [*conv_norm(3, _WIDTHS[0], 3, 2), nn.ReLU()]
    width, size = _WIDTHS[0], 32
    for stage, wider in enumerate(_WIDTHS):
        for index in range(2):
            block = Block("residual", width, wider, 3, 2 if stage and not index else 1, 1, size)
            body.append(block.build())
            width, size = wider, block.size_out
    return with_weights(body, width, 20, torch.Generator().manual_seed(0))


def train_teacher(
    images: Tensor, labels: Tensor, epochs: int, preprocessing: Preprocessing
) -> dict[str, Tensor]:
    """Weights of `tiny20_teacher` after training from labels on distorted views."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan(bfloat16=True, channels_last=device == "cpu", device=device, graphed=device == "cuda")
    network = tiny20_teacher()
    stage = Stage(
        name="teacher",
        model=network,
        views=Views(images, preprocessing, "crop-flip-trivial", 0, 0, device, margin=8),
        labels=labels,
        teacher=None,
        distillers=(),
        epochs=epochs,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-3,
        ema_decay=0.0,
        seed=0,
        plan=plan,
        optimizer="sgd",
    )
    fit(stage, lambda what, done, total: None)
    return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}


def write(folder: Path, name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    """The images as one uncompressed file, and a recipe that names it and the teacher."""
    pixels = [np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()) for images, _ in (train, test)]
    np.savez(
        folder / f"{name}.npz",
        train_images=pixels[0],
        train_labels=train[1].numpy(),
        val_images=pixels[1],
        val_labels=test[1].numpy(),
    )
    (folder / f"{name}.toml").write_text(
        f"[teacher]\nsource = \"tasks:{name}_teacher\"\nweights = '{folder / name}.safetensors'\n"
        f"mean = {list(MEAN)}\nstd = {list(STD)}\n\n[data]\nsource = '{folder / name}.npz'\n"
        'augment = "crop-flip-mix"\n',
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--tasks", nargs="+", choices=("cifar10", "tiny20"), default=["cifar10", "tiny20"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in (
        ("cifar10", ("cifar10_train_a25k_q95.npz", "cifar10_test.npz")),
        ("tiny20", ("tinyimagenet20_train.npz", "tinyimagenet20_val.npz")),
    ):
        if name not in arguments.tasks:
            continue
        train, test = (read_images(arguments.data, file)[:2] for file in files)
        height, width = train[0].shape[2:]
        preprocessing = Preprocessing(height, width, "rgb", MEAN, STD)
        network = cifar10_teacher() if name == "cifar10" else tiny20_teacher()
        weights = folder / f"{name}.safetensors"
        if name == "cifar10":
            stored = torch.load(arguments.models / "cifar10_resnet20_akamaster.pt", weights_only=True)
            save_file({key: value.contiguous() for key, value in stored.items()}, weights)
        elif not weights.exists():
            made = train_teacher(*train, arguments.epochs, preprocessing)
            save_file({key: v.half() if v.is_floating_point() else v for key, v in made.items()}, weights)
        network.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
        found = evaluate(network.eval(), normalise(test[0], preprocessing)).argmax(1)
        right = (found == test[1]).float().mean()
        write(folder, name, train, test)
        print(json.dumps({"task": name, "images": len(train[1]), "teacher_accuracy": round(float(right), 4)}))


if __name__ == "__main__":
    main()
