"""Peak memory of `edgekd quantize FILE.onnx` for a network of 25 million parameters at 224 pixels.

    python tools/bench/quantize_memory.py --images 5000 --calibration-images 512

Builds ResNet-50 (He et al. 2016, arXiv:1512.03385, table 1) with random weights, and a folder of JPEG images
of noise, of which a few are drawn and the rest are links to them; runs the command in a process of its own
and reads four times a second what that process and those that it starts hold together (proportional set size:
pages that they share count once). Prints the peak, and seconds and peak of each phase.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
import sys
from edgekd.cli import cli
from edgekd.console import Console

told = Console.step
def step(self, what, *rest):  # the phase goes to the parent
    with open(sys.argv[1], "w") as file:
        file.write(what)
    told(self, what, *rest)
Console.step = step
cli(sys.argv[2:], standalone_mode=False)
"""
_PERIOD_S = 0.25


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


def held_mib(process: int) -> float:
    """What a process and all that it started hold together."""
    total = 0.0
    for one in (process, *_children(process)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return total


def _children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(one) for one in task.read_text().split()]
        except OSError:
            continue
    return found + [below for one in found for below in _children(one)]


@dataclass
class Phase:
    """Seconds in it, and the most memory held."""

    seconds: float = 0.0
    peak_mib: float = 0.0


def watch(command: list[str], folder: Path) -> tuple[int, str, dict[str, Phase]]:
    """Exit code, standard error and phases of the command, which are named by its progress bars; "read" is
    before the first."""
    note, errors, phases = folder / "phase", folder / "stderr", {"read": Phase()}
    note.write_text("")
    with errors.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(note), *command], stdout=subprocess.DEVNULL, stderr=told
        )
        before = time.time()
        while process.poll() is None:
            time.sleep(_PERIOD_S)
            phase = phases.setdefault(note.read_text() or "read", Phase())
            phase.peak_mib = max(phase.peak_mib, held_mib(process.pid))
            now = time.time()
            phase.seconds += now - before
            before = now
    return process.returncode, errors.read_text(), phases


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
        code, told, phases = watch(command, folder)
        if code:
            sys.exit(told)
        record = json.loads((folder / "out" / "quantize.json").read_text())
        print(told)
        print(json.dumps({"calibration": record["calibration"], "load": round(os.getloadavg()[0], 1)}))
        print("\n| phase | s | MiB at most |\n|---|---|---|")
        whole = Phase(sum(p.seconds for p in phases.values()), max(p.peak_mib for p in phases.values()))
        for name, phase in (*phases.items(), ("whole command", whole)):
            print(f"| {name} | {phase.seconds:.0f} | {phase.peak_mib:,.0f} |")


if __name__ == "__main__":
    main()
