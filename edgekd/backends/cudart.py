"""The few calls of the CUDA runtime that an engine needs, through ctypes: a device needs no package for it.

Signatures as in ``cuda_runtime_api.h`` of CUDA 11 to 13.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from edgekd.errors import BackendError

_INTS, _PLACE = POINTER(c_int), POINTER(c_void_p)
# Argument types; each call returns a cudaError_t, 0 for success.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (_INTS,),
    "cudaDeviceGetAttribute": (_INTS, c_int, c_int),
    "cudaDriverGetVersion": (_INTS,),
    "cudaMalloc": (_PLACE, c_size_t),
    "cudaFree": (c_void_p,),
    "cudaMemcpyAsync": (c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreate": (_PLACE,),
    "cudaStreamSynchronize": (c_void_p,),
    "cudaEventCreate": (_PLACE,),
    "cudaEventRecord": (c_void_p, c_void_p),
    "cudaEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
}
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, -Minor
_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib")
_WHEELS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")  # below site-packages


@functools.cache
def load() -> ctypes.CDLL:
    """The library, with its signatures.

    Raises:
        BackendError: none is found.
    """
    wheels = [str(Path(entry) / folder) for entry in sys.path for folder in _WHEELS]
    places = [f"{folder}/{name}" for folder in (*_FOLDERS, *wheels) for name in _NAMES]
    found = [name for name in (ctypes.util.find_library("cudart"),) if name]
    for name in (*found, *_NAMES, *(place for place in places if Path(place).is_file())):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for call, arguments in SIGNATURES.items():
            function = getattr(library, call)
            function.argtypes, function.restype = arguments, c_int
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (c_int,), c_char_p
        return library
    raise BackendError(
        f"no CUDA runtime is found: {_NAMES[0]} or an older one, in the loader's path or {_FOLDERS[0]}",
        "a Jetson has it from JetPack (cuda-cudart); elsewhere: python -m pip install nvidia-cuda-runtime",
    )


def call(name: str, *arguments: Any) -> None:
    """One call of `SIGNATURES`.

    Raises:
        BackendError: it failed; in CUDA's words.
    """
    library = load()
    if code := getattr(library, name)(*arguments):
        raise BackendError(f"CUDA: {name}: {library.cudaGetErrorString(code).decode()} (error {code})")


def compute_capability() -> str:
    """Of device 0, such as "8.7"."""
    values = []
    for attribute in (_MAJOR, _MINOR):
        value = c_int()
        call("cudaDeviceGetAttribute", byref(value), attribute, 0)
        values.append(value.value)
    return f"{values[0]}.{values[1]}"


def device_count() -> int:
    """How many devices the driver shows."""
    count = c_int()
    call("cudaGetDeviceCount", byref(count))
    return count.value


def driver() -> str:
    """The CUDA version that the driver supports, and what the system says of it: "12060, NVRM version: …"."""
    version = c_int()
    call("cudaDriverGetVersion", byref(version))
    told = [str(version.value)]
    for path in ("/proc/driver/nvidia/version", "/etc/nv_tegra_release"):
        try:
            told.append(Path(path).read_text(encoding="utf-8").partition("\n")[0].strip())
        except OSError:
            continue
    return ", ".join(told)


def allocate(size: int) -> int:
    """Address of `size` bytes on the device, until `free` or the end of the process."""
    place = c_void_p()
    call("cudaMalloc", byref(place), size)
    return place.value or 0


def free(address: int) -> None:
    call("cudaFree", address)


class Stream:
    """A queue of work, with an event before and one after what is timed."""

    def __init__(self) -> None:
        self.handle, self._begin, self._end = c_void_p(), c_void_p(), c_void_p()
        call("cudaStreamCreate", byref(self.handle))
        call("cudaEventCreate", byref(self._begin))
        call("cudaEventCreate", byref(self._end))

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        """`kind`: `TO_DEVICE` or `TO_HOST`."""
        call("cudaMemcpyAsync", to, source, size, kind, self.handle)

    def begin(self) -> None:
        call("cudaEventRecord", self._begin, self.handle)

    def end(self) -> None:
        call("cudaEventRecord", self._end, self.handle)

    def wait(self) -> None:
        call("cudaStreamSynchronize", self.handle)

    def elapsed_ms(self) -> float:
        """Between the last `begin` and `end`, once both have happened."""
        took = c_float()
        call("cudaEventElapsedTime", byref(took), self._begin, self._end)
        return took.value
