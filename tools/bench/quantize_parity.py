"""Does an int8 file compute the same on aarch64 as here? On a card's processor as qemu emulates it.

    python tools/bench/quantize_parity.py RUN/candidates/int8-arm-s8.onnx --data test.npz --emulate rpi5

RUN is what `edgekd quantize FILE.onnx --target rpi5 --data test.npz` left. The reference is ONNX Runtime
here, node by node; against it ONNX Runtime here and on each emulated processor, optimised and node by node:
how often the largest output is the same, and the difference in steps of the output's grid.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from edgekd.emulation import emulated
from edgekd.profiler import HERE, Device, Protocol, Variant, evaluate
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.samples import Pixels, load_samples
from edgekd.stages.onnx_parity import compare, output_step
from edgekd.target import find_target


def answers_of(model: Path, data: Path, device: Device, folder: Path) -> dict[str, np.ndarray]:
    """First outputs, optimised and node by node."""
    variants = [
        Variant(name, backend, str(model.resolve()))
        for name, backend in (("optimised", "onnxruntime"), ("node by node", "reference"))
    ]
    made = folder / "answers.npz"
    evaluate(variants, data=data, answers=made, protocol=Protocol(timeout_s=900), device=device)
    with np.load(made) as held:
        return {name: held[name] for name in held.files}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--data", required=True, help="samples, as `edgekd quantize` reads them")
    parser.add_argument("--emulate", nargs="+", default=["rpi5", "rpi4"], help="cards")
    parser.add_argument("--count", type=int, default=64, help="samples")
    arguments = parser.parse_args()
    devices: dict[str, Device] = {"x86-64, this machine": HERE}
    for card in arguments.emulate:
        made = emulated(find_target(card), None, None, lambda text: print(text, file=sys.stderr))
        devices[made.name] = made
    print("| file | on | graph | same class | mean, most steps |\n|---|---|---|---|---|")
    for model in arguments.models:
        whole = load_float(model.with_name("float.onnx"))
        samples = load_samples(arguments.data, whole, Pixels())
        step = output_step(onnx.load(model))
        with tempfile.TemporaryDirectory() as temporary:
            data = Path(temporary) / "data.npz"
            np.savez(data, **samples.read(np.arange(min(arguments.count, samples.count))))  # type: ignore[arg-type]
            found = {name: answers_of(model, data, one, Path(temporary)) for name, one in devices.items()}
        reference = next(iter(found.values()))["node by node"]
        for device, answers in found.items():
            for graph, got in answers.items():
                if got is reference:
                    continue
                row = compare(reference, got, step)
                steps = "-" if step is None else f"{row['mean_steps']:.3f}, {row['max_steps']:.0f}"
                named = f"{model.parent.parent.name}, {model.stem}"
                print(
                    f"| {named} | {device} | {graph} | {100 * row['top1_agreement']:.1f} % | {steps} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
