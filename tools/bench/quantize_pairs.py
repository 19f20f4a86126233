"""Two int8 files of one network against each other, alone in a process: which one is faster, and how surely?

    python tools/bench/quantize_pairs.py openvino int8-nncf.onnx int8-openvino-u8.onnx

In one process with many candidates a file is faster the more of its kernels others have too: oneDNN shares
compiled kernels of equal shape, and a copy of a file makes both copies up to 10 % faster. So a session here
holds the first file and one other; the files load in either order, calls alternate, the ratio of the medians
of CPU time is one number a session. Prints its mean with its standard error over sessions; the first file
against itself is no control for the same reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import onnx

from edgekd.backends.feeds import Feed
from edgekd.profiler import Protocol, Variant, run_session


def ratios(runtime: str, first: Path, other: Path, sessions: int, rounds: int) -> list[float]:
    """CPU time of a call of `other` over that of `first`, one number a session."""
    port = onnx.load(first, load_external_data=False).graph.input[0]
    kind = port.type.tensor_type
    shape = tuple(dim.dim_value or 1 for dim in kind.shape.dim)
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    found = []
    for seed in range(sessions):
        files = {"first": first, "other": other}
        pair = [Variant(name, runtime, str(path.resolve())) for name, path in files.items()]
        result = run_session(
            pair[:: 1 if seed % 2 else -1],
            protocol=Protocol(1, rounds, 3, seed),
            inputs=[Feed(port.name, dtype, shape)],
        )
        middle = {
            name: statistics.median(call for calls in times.cpu_ms for call in calls)
            for name, times in result.variants.items()
        }
        found.append(middle["other"] / middle["first"])
    return found


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runtime", choices=("onnxruntime", "openvino"))
    parser.add_argument("first", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    print(f"| on {arguments.runtime} | CPU time / {arguments.first.stem} | least and most |\n|---|---|---|")
    for other in arguments.others:
        got = ratios(arguments.runtime, arguments.first, other, arguments.sessions, arguments.rounds)
        error = statistics.stdev(got) / len(got) ** 0.5 if len(got) > 1 else float("nan")
        told = f"{statistics.mean(got):.3f} ± {error:.3f}"
        print(f"| {other.stem} | {told} | {min(got):.3f} {max(got):.3f} |", flush=True)
    print(
        f"\n{arguments.sessions} sessions of {arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
