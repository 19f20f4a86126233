"""Peak memory of `edgekd quantize FILE.onnx` for a network of 25 million parameters at 224 pixels.

    python tools/bench/quantize_memory.py --images 5000 --calibration-images 512

Builds ResNet-50 (He et al. 2016, arXiv:1512.03385, table 1) with random weights, and a folder of JPEG images
of noise, of which a few are drawn and the rest are links to them; runs the command in a process of its own
and prints the largest resident set of that process, and of the processes that it starts to measure in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from edgekd import export
from edgekd.nets import count_parameters
from edgekd.quantize.capture import capture
from edgekd.spec import ModelSpec, Preprocessing

_CHILD = """
import json, resource, sys
from edgekd.cli import cli
try:
    cli(sys.argv[1:], standalone_mode=False)
finally:
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(json.dumps([resource.getrusage(who).ru_maxrss / 1024 for who in whose]), file=sys.stderr)
"""


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """25.6 million parameters, 4.1 billion multiply-accumulates at 224 pixels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    width_in = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(_Bottleneck(width_in, width, 2 if stage and not block else 1))
            width_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes))


def prepare(folder: Path, size: int, images: int) -> tuple[Path, Path]:
    """The model, and the images."""
    torch.manual_seed(0)
    model = resnet50().eval()
    print(f"{count_parameters(model) / 1e6:.1f} million parameters", file=sys.stderr)
    preprocessing = Preprocessing(size, size, "rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    spec = ModelSpec(preprocessing, tuple(map(str, range(1000))))
    path, pictures = folder / "resnet50.onnx", folder / "images"
    export.save(export.to_onnx(capture(model, spec.input_shape), spec), path)
    pictures.mkdir()
    draw = np.random.default_rng(0)
    for number in range(images):
        picture = pictures / f"{number:05d}.jpg"
        if number < 20:
            coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))
            coarse.resize((size, size)).save(picture, quality=90)
        else:
            picture.hardlink_to(pictures / f"{number % 20:05d}.jpg")
    return path, pictures


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--calibration-images", type=int, default=512)
    parser.add_argument("--target", default="x86")
    parser.add_argument("more", nargs="*", help="further options of the command, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, pictures = prepare(folder, arguments.size, arguments.images)
        command = ["quantize", str(model), "--target", arguments.target, "--data", str(pictures)]
        command += ["--out", str(folder / "out"), "--max-drop", "100"]
        command += ["--set", f"quantize.calibration_images={arguments.calibration_images}", *arguments.more]
        started = time.time()
        done = subprocess.run([sys.executable, "-c", _CHILD, *command], stderr=subprocess.PIPE, check=False)
        told = done.stderr.decode()
        if done.returncode:
            sys.exit(told)
        record = json.loads((folder / "out" / "quantize.json").read_text())
        print(json.dumps({
            "peak_mib": json.loads(told.splitlines()[-1]),
            "calibration": record["calibration"],
            "chosen": record["chosen"],
            "seconds": round(time.time() - started),
            "load": round(os.getloadavg()[0], 1),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
