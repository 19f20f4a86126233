"""A teacher that is asked about images outside of a run, and what it answered before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.errors import DataError, TeacherError
from edgekd.files import sha256_json, write_atomic
from edgekd.recipe import Recipe
from edgekd.run import Reporter
from edgekd.selection import softmax
from edgekd.sources import load_dataset
from edgekd.sources.dataset import Request
from edgekd.sources.unlabeled import Corpus, load_unlabeled
from edgekd.stages.ready import model_spec, ready_teacher
from edgekd.tasks.classification import normalise, to_tensor
from edgekd.teacher import LoadedTeacher, Teacher

Images = NDArray[np.uint8]
_CHUNK = 512  # images whose answers are stored together


@dataclass(frozen=True)
class Annotator:
    """`teacher` answers about uint8 (N, H, W, C) images; its answers are kept in `folder`, one file for every
    512 images, named after their pixels, the teacher and the preprocessing: nothing is asked twice, and a
    process that was killed goes on where it stopped."""

    teacher: Teacher
    folder: Path
    progress: Callable[[str, int, int], None]

    @property
    def preprocessing_sha256(self) -> str:
        """Of size, colour, mean and deviation."""
        return sha256_json(asdict(self.teacher.spec.preprocessing))

    def probabilities(self, images: Images) -> NDArray[np.float16]:
        """(N, classes) of the teacher."""
        parts = []
        for begin in range(0, len(images), _CHUNK):
            part = images[begin : begin + _CHUNK]
            parts.append(self._kept(part))
            self.progress("ask the teacher", begin + len(part), len(images))
        return np.concatenate(parts)

    def _kept(self, images: Images) -> NDArray[np.float16]:
        digest = hashlib.sha256(np.ascontiguousarray(images).data)
        key = [digest.hexdigest(), self.teacher.sha256, self.preprocessing_sha256]
        path = self.folder / f"{sha256_json(key)[:24]}.npy"
        if path.exists():
            stored: NDArray[np.float16] = np.load(path, allow_pickle=False)
            return stored
        logits = [self.teacher.logits(part) for part in torch.split(self.inputs(images), 128)]
        made = softmax(torch.cat(logits).numpy()).astype(np.float16)

        def store(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, made)

        write_atomic(path, store)
        return made

    def embeddings(self, images: Images) -> NDArray[np.float32] | None:
        """(N, D), the classifier's inputs; None for a teacher that does not show them."""
        if self.teacher.model is None:
            return None
        rows = []
        for part in torch.split(self.inputs(images), 128):
            found = self.teacher.outputs(part).embedding
            if found is None:
                return None
            rows.append(found)
        embedded: NDArray[np.float32] = torch.cat(rows).numpy()
        return embedded

    def inputs(self, images: Images) -> Tensor:
        """Normalised float32 (N, C, H, W)."""
        return normalise(to_tensor(images), self.teacher.spec.preprocessing)


def read_pool(recipe: Recipe, loaded: LoadedTeacher, reporter: Reporter) -> Corpus:
    """The images that ``data.unlabeled`` names, as the teacher wants them."""
    if not recipe.data.unlabeled:
        raise DataError("there are no images without labels", "--unlabeled FOLDER or FILE.npz")
    size = recipe.data.image_size
    wanted = (size, size) if size else loaded.image_size
    color = {None: None, 1: "grey"}.get(loaded.channels, "rgb")
    request = Request(
        recipe.data, recipe.seed, wanted, color, progress=lambda a, b: reporter.step("read images", a, b)
    )
    return load_unlabeled(recipe.data.unlabeled, request, "--unlabeled")


def read_labelled(
    recipe: Recipe, source: str, shape: Sequence[int]
) -> tuple[Images, NDArray[np.int64], tuple[str, ...]]:
    """All images of a labelled source, of both its parts, in the (height, width, channels) of `shape`, with
    labels and class names; of ``demo`` the validation part."""
    height, width, channels = shape
    color = "grey" if channels == 1 else "rgb"
    named = msgspec.structs.replace(recipe.data, source=source)
    data = load_dataset(named, seed=recipe.seed, image_size=(height, width), color=color)
    if source == "demo":
        return data.validation_images, data.validation_labels, data.classes
    images = np.concatenate([data.train_images, data.validation_images])
    return images, np.concatenate([data.train_labels, data.validation_labels]), data.classes


def open_annotator(
    recipe: Recipe,
    loaded: LoadedTeacher,
    images: Images,
    classes: tuple[str, ...],
    folder: Path,
    reporter: Reporter,
) -> Annotator:
    """The recipe's teacher for images like these.

    Raises:
        TeacherError: its number of outputs is not that of `classes`.
    """
    spec = model_spec(loaded, recipe.teacher, images.shape[1:], classes)
    examples = normalise(to_tensor(images[:256]), spec.preprocessing)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = ready_teacher(
        loaded, recipe.teacher.source, spec, folder=folder, inputs=examples, threads=recipe.threads,
        say=reporter.say,
    )  # fmt: skip
    return Annotator(teacher, folder, reporter.step)


def class_names(
    loaded: LoadedTeacher, shape: Sequence[int], given: tuple[str, ...], known: tuple[str, ...]
) -> tuple[str, ...]:
    """The teacher's classes in the order of its outputs: the names `given`, else those its file states, else
    those `known` from labelled images, else numbers.

    Raises:
        TeacherError: the number of names is not that of the outputs.
        DataError: there are fewer than two classes.
    """
    outputs = _outputs(loaded, shape)
    names = given or loaded.classes or known
    if outputs is None and not names:
        raise TeacherError(
            "the teacher's file does not say how many classes it has", "name them: --classes cat,dog,horse"
        )
    if outputs is not None and names and len(names) != outputs:
        raise TeacherError(
            f"the teacher has {outputs} outputs, and {len(names)} classes are named: {', '.join(names[:12])}",
            "name all classes in the order of its outputs: --classes cat,dog,horse",
        )
    made = names or tuple(str(index) for index in range(outputs or 0))
    if len(made) < 2:
        raise DataError(f"{len(made)} class(es); a classifier needs at least two")
    return made


def _outputs(loaded: LoadedTeacher, shape: Sequence[int]) -> int | None:
    if loaded.model is None:
        return loaded.outputs
    height, width, channels = shape
    try:
        with torch.no_grad():
            logits = loaded.model.eval()(torch.zeros(1, channels, height, width))
    except RuntimeError as error:
        raise TeacherError(
            f"the teacher refuses images of {height}x{width} with {channels} channels: "
            f"{str(error).splitlines()[0]}",
            "resize them as it wants: --image-size N",
        ) from error
    return int(logits.shape[-1])
