"""Do all executors compute the same of one quantized file? Against ONNX Runtime node by node, in steps of the
output's grid; and on older processors, whose kernels add 8-bit products in 16 bits, which can overflow.

oneDNN, inside OpenVINO, obeys ``ONEDNN_MAX_CPU_ISA``, which only counts when set before the process starts:
a check on AVX2 is a process of its own, and the kernels' names prove that it was AVX2. ONNX Runtime has no
such limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekd.backends import backend
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import BackendError, MissingExtraError

Array = NDArray[np.float32]
OLD_ISA = "AVX2"  # without VNNI
NOT_TAKEN = {"arm-s8": "OpenVINO is not for this dialect: it computes something else"}
_TIMEOUT_S = 300.0


def output_step(model: onnx.ModelProto) -> float | None:
    """The scale of the first output's grid; None where the output is not quantized."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    name = model.graph.output[0].name
    maker = next((node for node in model.graph.node if name in node.output), None)
    if maker is None or maker.op_type != "DequantizeLinear" or maker.input[1] not in values:
        return None
    return float(onnx.numpy_helper.to_array(values[maker.input[1]]).flat[0])


def compare(reference: Array, got: Array, step: float | None) -> dict[str, Any]:
    """Agreement of the largest entry (of classifiers), and the difference in values and in steps."""
    difference = np.abs(reference.astype(np.float64) - got)
    classes = reference.ndim == 2 and reference.shape[1] > 1
    return {
        "top1_agreement": float((reference.argmax(1) == got.argmax(1)).mean()) if classes else None,
        "mean_abs": float(difference.mean()),
        "max_abs": float(difference.max()),
        "largest": float(np.abs(reference).max()),
        "mean_steps": None if step is None else float(difference.mean() / step),
        "max_steps": None if step is None else float(difference.max() / step),
    }


def parity_rows(path: Path, inputs: Path, dialect: str = "") -> list[dict[str, Any]]:
    """One row an executor: ONNX Runtime optimised, OpenVINO, and OpenVINO on AVX2. An executor that cannot
    run the file, or is not installed, has its reason.

    Args:
        inputs: a ``.npz`` file with the inputs of one call by name.
        dialect: of the file; what an executor is not for is told beside its numbers.
    """
    step = output_step(onnx.load(path))
    feeds = _feeds(inputs)
    reference = OnnxRuntimeBackend().open(path, optimize=False).run(feeds)
    rows = []
    for name in ("onnxruntime", "openvino", f"openvino {OLD_ISA}"):
        row: dict[str, Any] = {"file": path.name, "executor": name, "kernels": {}, "reason": ""}
        try:
            if name.endswith(OLD_ISA):
                got, kernels = _on_old_processor(path, inputs)
                row["kernels"] = kernels
            else:
                got = backend(name).open(path).run(feeds)
        except (BackendError, MissingExtraError) as error:
            row["reason"] = error.message
        else:
            row |= compare(reference, got, step)
            row["reason"] = NOT_TAKEN.get(dialect, "") if name.startswith("openvino") else ""
        rows.append(row)
    return rows


def overflows(rows: list[dict[str, Any]]) -> list[str]:
    """Files that compute something else on AVX2 than on this processor, with by how much, in words: the
    largest difference to the reference is three times that of the same runtime here, or more, and more than
    1 % of the largest output."""
    by_name = {(row["file"], row["executor"]): row for row in rows if not row["reason"]}
    found = []
    for (file, executor), row in by_name.items():
        here = by_name.get((file, "openvino"))
        if not executor.endswith(OLD_ISA) or here is None or row["max_abs"] <= 0.01 * row["largest"]:
            continue
        least = max(here["max_abs"], 1e-3 * row["largest"])
        if row["max_abs"] > 3 * least:
            agreed = row["top1_agreement"]
            told = f"{row['max_abs'] / least:.0f} times the difference" if least else "other outputs than 0"
            same = "" if agreed is None else f", the same class on {100 * agreed:.0f} % of a batch"
            found.append(f"{file}: {told}{same}")
    return found


def _feeds(inputs: Path) -> dict[str, NDArray[Any]]:
    with np.load(inputs, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def _on_old_processor(path: Path, inputs: Path) -> tuple[Array, dict[str, int]]:
    package = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    output = inputs.with_name("old.npy")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgekd.stages.onnx_parity", str(path), str(inputs), str(output)],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=os.environ | {"ONEDNN_MAX_CPU_ISA": OLD_ISA, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the check on {OLD_ISA} did not end within {_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise BackendError(f"the check on {OLD_ISA} failed: {done.stderr.decode(errors='replace')[-300:]}")
    made = np.load(output, allow_pickle=False)
    output.unlink()
    return made, json.loads(done.stdout)


def _worker(path: str, inputs: str, output: str) -> None:
    """In a process with a limited instruction set: the output to a file, kernels with products to stdout."""
    engine = backend("openvino")
    coverage = engine.coverage(Path(path))
    np.save(output, engine.open(Path(path)).run(_feeds(Path(inputs))))
    print(json.dumps(Counter(layer.op for layer in coverage.layers if layer.macs)))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
