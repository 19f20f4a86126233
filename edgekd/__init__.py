"""edgekd: from a trained teacher to a small, quantized, verified model for one edge device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "compress"]

if TYPE_CHECKING:
    from edgekd.pipeline import compress


def __getattr__(name: str) -> Any:
    if name == "compress":  # torch is loaded on first use, not on import
        from edgekd.pipeline import compress

        return compress
    raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
