"""Where samples come from; one kind of source a file. Images are decoded once, to uint8 arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekd.errors import DataError
from edgekd.recipe import DataRecipe
from edgekd.sources import arrays, demo, hf_dataset, image_folder
from edgekd.sources.dataset import Dataset, Request, summary

__all__ = ["SOURCES", "Dataset", "Request", "load_dataset", "summary"]

# A path is read by the first source that accepts it.
SOURCES: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Request], Dataset]]] = {
    "npz": (arrays.accepts, arrays.load),
    "datasets": (hf_dataset.accepts, hf_dataset.load),
    "image-folder": (image_folder.accepts, image_folder.load),
}


def load_dataset(
    recipe: DataRecipe,
    *,
    seed: int,
    image_size: tuple[int, int] | None = None,
    color: str | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read the images that ``recipe.source`` names.

    Args:
        recipe: `source` is ``demo`` or a path; `image_size` counts when the argument is `None`.
        seed: decides the validation part of a source that has none.
        image_size: (height, width) every image is resized to; `None`: as stored, when all agree.
        color: "grey", "rgb", or `None`: as stored (colour when any image has colour).
        cache: folder for decoded images that are too large for memory.
        progress: called with (images done, images in all) while decoding files.

    Raises:
        DataError: the source does not exist, or its images or labels cannot be used.
        MissingExtraError: a package that the source needs is not installed.
        StorageError: the cache cannot be written.
    """
    if color not in ("grey", "rgb", None):
        raise DataError(f"color '{color}' is not known", "choose 'grey' or 'rgb'")
    if image_size is None and recipe.image_size:
        image_size = (recipe.image_size, recipe.image_size)
    request = Request(recipe, seed, image_size, color, cache, progress)
    if recipe.source == "demo":
        return demo.load(request)
    path = Path(recipe.source).expanduser()
    if not path.exists():
        raise DataError(
            f"data.source '{recipe.source}' does not exist",
            "give 'demo', a folder of images, a .npz file or a folder written by save_to_disk",
        )
    for accepts, load in SOURCES.values():
        if accepts(path):
            return load(path, request)
    raise DataError(
        f"data.source '{recipe.source}' is a file that no source reads",
        "give a .npz file or a folder of images",
    )
