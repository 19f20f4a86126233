"""Images without labels: where they come from, what is left out, and how they join a training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from samples import shapes, write_npz

from edgekd.errors import DataError
from edgekd.orders import epoch_order
from edgekd.recipe import DataRecipe
from edgekd.sources import load_dataset
from edgekd.sources.dataset import Request
from edgekd.sources.unlabeled import load_unlabeled, without_copies
from edgekd.stages.training_set import TrainingSet, has_unlabelled, training_set, unlabelled_rows

GREY = Request(DataRecipe(), 0, (16, 16), "grey")


def save_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:02}.png")
    return folder


# ---------------------------------------------------------------- sources


def test_a_folder_is_read_at_any_depth_and_names_follow_the_images(tmp_path: Path) -> None:
    images, _ = shapes(6, 5)
    save_images(tmp_path / "b" / "deep", images[3:])
    save_images(tmp_path / "a", images[:3])
    save_images(tmp_path / ".hidden", images)
    corpus = load_unlabeled(str(tmp_path), GREY)
    assert np.array_equal(corpus.images[..., 0], images)
    assert corpus.names[3] == str(tmp_path / "b" / "deep" / "00.png")


def test_an_unreadable_image_is_named_or_left_out(tmp_path: Path) -> None:
    images, _ = shapes(4, 5)
    save_images(tmp_path, images)
    (tmp_path / "01.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"01\.png"):
        load_unlabeled(str(tmp_path), GREY)
    lenient = Request(DataRecipe(skip_bad=True), 0, (16, 16), "grey")
    corpus = load_unlabeled(str(tmp_path), lenient)
    assert [Path(name).name for name in corpus.names] == ["00.png", "02.png", "03.png"]
    assert np.array_equal(corpus.images[..., 0], images[[0, 2, 3]])
    assert len(corpus.skipped) == 1


@pytest.mark.parametrize("name", ["images", "x", "train_images"])
def test_labels_of_an_archive_are_not_looked_at(tmp_path: Path, name: str) -> None:
    images, _ = shapes(5, 5)
    arrays: dict[str, Any] = {name: images, "train_labels": np.full(5, -1)}
    np.savez(tmp_path / "pool.npz", **arrays)
    corpus = load_unlabeled(str(tmp_path / "pool.npz"), Request(DataRecipe(), 0, (8, 8), "rgb"))
    assert corpus.images.shape == (5, 8, 8, 3)
    assert corpus.names[4] == f"pool.npz:{name}[4]"


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", numbers=np.arange(3))
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for source, text in {
        "nowhere": "does not exist", "text.txt": "is a file that no source reads",
        "empty": "holds no image", "other.npz": "it holds: numbers",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=text):
            load_unlabeled(str(tmp_path / source), GREY)


def test_copies_are_found_by_their_pixels() -> None:
    images = shapes(8, 5)[0][..., None]
    changed = images[:2].copy()
    changed[1, 0, 0] ^= 1
    assert without_copies(images, [changed, images[6:]]).tolist() == [1, 2, 3, 4, 5]
    assert without_copies(images, []).tolist() == list(range(8))


# ---------------------------------------------------------------- the training set


def joined(tmp_path: Path, logits: Any = None, **changes: Any) -> TrainingSet:
    """A training set of 40 images, 4 of them held out, and of a pool that ``pool.npz`` holds."""
    recipe = DataRecipe(source=str(write_npz(tmp_path / "data.npz", 40, 12)))
    data = load_dataset(recipe, seed=0)
    request = Request(msgspec.structs.replace(recipe, **changes), 0, (16, 16), "grey")
    return training_set(data, np.arange(36), np.arange(36, 40), request, logits)


def test_without_a_pool_every_image_keeps_its_label(tmp_path: Path) -> None:
    made = joined(tmp_path)
    assert (len(made.images), made.pool) == (36, None)
    assert made.labels.tolist() == [index % 4 for index in range(36)]


def test_a_pool_joins_without_labels_and_without_copies_of_held_out_images(tmp_path: Path) -> None:
    fresh, validation, train = shapes(10, 9)[0], shapes(12, 1)[0], shapes(40, 0)[0]
    np.savez(tmp_path / "pool.npz", images=np.concatenate([fresh, validation[:2], train[38:], train[:1]]))
    made = joined(tmp_path, unlabeled=str(tmp_path / "pool.npz"))
    assert made.pool == {
        "source": str(tmp_path / "pool.npz"), "found": 15, "copies_of_held_out": 4, "kept": 11, "skipped": [],
    }  # fmt: skip
    assert np.array_equal(made.images[36:46, ..., 0], fresh)
    assert made.labels[36:].tolist() == [-1] * 11
    assert (made.labels[:36] >= 0).all()


def test_the_teacher_chooses_the_surest_of_each_class(tmp_path: Path) -> None:
    images = shapes(10, 9)[0]
    np.savez(tmp_path / "pool.npz", images=images)
    sure = np.zeros((10, 4), np.float32)
    sure[:, 1] = np.arange(10)
    sure[3] = [0, 0, 9, 0]

    def logits(asked: np.ndarray) -> np.ndarray:
        return sure[[int(np.flatnonzero((images == one[..., 0]).all((1, 2)))[0]) for one in asked]]

    made = joined(tmp_path, logits, unlabeled=str(tmp_path / "pool.npz"), pool_per_class=2)
    # Row 0 has equal logits and counts as class 0.
    assert np.array_equal(made.images[36:, ..., 0], images[[0, 3, 8, 9]])


def test_a_pool_of_copies_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "pool.npz", images=shapes(12, 1)[0])
    with pytest.raises(DataError, match="all of its 12 images are copies"):
        joined(tmp_path, unlabeled=str(tmp_path / "pool.npz"))


def test_labels_are_put_aside_evenly_and_by_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [100, 20, 3])
    aside = unlabelled_rows(labels, 0.1, 0)
    kept = np.delete(labels, aside)
    assert np.bincount(kept).tolist() == [10, 2, 1]
    assert np.array_equal(aside, unlabelled_rows(labels, 0.1, 0))
    assert not np.array_equal(aside, unlabelled_rows(labels, 0.1, 1))
    assert len(unlabelled_rows(labels, 1.0, 0)) == 0


def test_a_recipe_says_whether_labels_may_be_missing() -> None:
    assert not has_unlabelled(DataRecipe())
    assert has_unlabelled(DataRecipe(unlabeled="pool"))
    assert has_unlabelled(DataRecipe(labelled_fraction=0.5))


# ---------------------------------------------------------------- the order of an epoch


def order(labels: torch.Tensor, *, paired: bool, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return epoch_order(labels, torch.Size((5, 8)), generator, paired=paired)


def test_half_of_a_paired_batch_is_labelled() -> None:
    labels = torch.full((43,), -1)
    labels[[3, 17, 40]] = torch.tensor([0, 1, 0])
    made = order(labels, paired=True)
    assert made.shape == (5, 8)
    assert (labels[made] >= 0).sum(1).tolist() == [4] * 5
    shown = made[:, :4].flatten().bincount(minlength=43)
    assert set(shown[[3, 17, 40]].tolist()) <= {6, 7}
    rest = made[:, 4:].flatten()
    assert len(rest.unique()) == len(rest) == 20
    assert not torch.equal(made, order(labels, paired=True, seed=1))


@pytest.mark.parametrize("known", [0, 43])
def test_samples_that_all_or_none_have_labels_are_shuffled_as_ever(known: int) -> None:
    labels = torch.full((43,), -1)
    labels[:known] = 1
    plain = torch.randperm(43, generator=torch.Generator().manual_seed(0))[:40].view(5, 8)
    assert torch.equal(order(labels, paired=True), plain)
    assert torch.equal(order(labels, paired=False), plain)
