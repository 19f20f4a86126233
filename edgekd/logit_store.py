"""Teacher logits of the views of a training set on disk, so that a resumed training does not ask again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from edgekd.files import sha256_json, write_atomic

log = logging.getLogger(__name__)


class LogitStore:
    """One file a view, ``NAME-VIEW.safetensors``, that carries the digest of what its logits depend on.

    Logits are kept as they are, in float32: a training that goes on after it was killed sees the very bits
    that it would have seen. Files of another teacher, other data or other views are deleted, with a notice.
    """

    def __init__(
        self, folder: Path, name: str, depends_on: list[object], say: Callable[[str], None], *, writes: bool
    ) -> None:
        """`depends_on`: values that JSON can write. `writes`: whether this process may change the files."""
        self._folder, self._name, self._say, self._writes = folder, name, say, writes
        self._digest = sha256_json(depends_on)

    def path(self, view: int) -> Path:
        """The file of a view."""
        return self._folder / f"{self._name}-{view}.safetensors"

    def read(self, view: int) -> tuple[Tensor, tuple[int, ...]] | None:
        """Stored logits (N, columns) and how many columns are of each teacher; None where there are none
        that can be used."""
        from safetensors import SafetensorError, safe_open

        path = self.path(view)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                stated = file.metadata() or {}
                if stated.get("depends_on") == self._digest:
                    return file.get_tensor("logits"), tuple(map(int, stated["widths"].split()))
        except (SafetensorError, OSError) as error:
            self._discard(f"cannot be read ({error})")
            return None
        self._discard("belong to another teacher, other data or other views")
        return None

    def _discard(self, reason: str) -> None:
        if not self._writes:
            return
        self._say(f"  stored teacher logits in {self._folder} {reason}; they are computed again")
        for path in self._folder.glob(f"{self._name}-*.safetensors"):
            path.unlink(missing_ok=True)

    def write(self, view: int, logits: Tensor, widths: tuple[int, ...]) -> None:
        """Keep the logits (N, columns) of a view; `widths` are the columns of each teacher."""
        from safetensors.torch import save_file

        if not self._writes:
            return
        tensors = {"logits": logits.cpu().contiguous()}
        metadata = {"depends_on": self._digest, "widths": " ".join(map(str, widths))}
        write_atomic(self.path(view), lambda path: save_file(tensors, path, metadata))
        log.info("teacher logits of view %d stored in %s", view, self.path(view))
