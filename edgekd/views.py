"""Augmented views of a training set that can be replayed, and the teacher's logits on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distortions import Distortions
from edgekd.logit_store import LogitStore
from edgekd.nets import Outputs
from edgekd.ranks import ALONE, Ranks
from edgekd.spec import Preprocessing

AUGMENTATIONS = (
    "crop-mix", "crop-flip-mix", "crop-trivial", "crop-flip-trivial", "crop-flip", "crop", "none",
)  # fmt: skip
_DISTORTED = 0.5  # share of the images of a "-trivial" view


class Views:
    """Views of a training set, each a function of (seed, view, sample): the same view always shows the same
    pixels, so what a teacher says about it can be stored and stays exact.

    ``crop`` shifts each image; ``crop-flip`` mirrors half of them too; ``-mix`` blends, in every second view,
    each image with another one (mixup, Zhang et al. 2018, arXiv:1710.09412, eq. 1, used as in Beyer et al.
    2022, arXiv:2106.05237: the teacher labels the blend). A blend has no label of its own. ``-trivial``
    distorts half of the images of each view (`Distortions`).

    The images live on one device; `select` writes the coordinates of a view into fixed tensors, so a
    captured CUDA graph that reads them shows the view selected last.
    """

    def __init__(
        self,
        images: Tensor,
        preprocessing: Preprocessing,
        augment: str,
        count: int,
        seed: int,
        device: torch.device | str = "cpu",
        margin: int | None = None,
    ) -> None:
        """`images`: uint8 (N, C, H, W). `count`: number of different views; 0 is a new one every epoch.
        `margin`: largest shift in pixels; None is 1/28 of the size."""
        self.count = 1 if augment == "none" else count
        self.augment, self.mixes = augment, augment.endswith("-mix")
        self._flips, self._seed = "flip" in augment, seed
        self._size = (images.shape[2], images.shape[3])
        if margin is None:
            margin = max(1, round(max(self._size) / 28))
        self._margin = 0 if augment == "none" else margin
        # Black borders are what a shifted camera sees of nothing; the same constant for every channel.
        self._padded = F.pad(images, (self._margin,) * 4).to(device)
        shape = (1, preprocessing.channels, 1, 1)
        self._mean = torch.tensor(preprocessing.mean, device=device).view(shape)
        self._std, self._scale = (
            torch.tensor(preprocessing.std, device=device).view(shape),
            preprocessing.scale,
        )
        samples = len(images)
        distorts = augment.endswith("-trivial")
        self._distortions = Distortions(samples, self._size, device) if distorts else None
        self._rows = torch.zeros(samples, dtype=torch.int64, device=device)
        self._columns = torch.zeros(samples, dtype=torch.int64, device=device)
        self._flip = torch.zeros(samples, dtype=torch.bool, device=device)
        self._partner = torch.arange(samples, device=device)
        self._share = torch.ones(samples, device=device)
        self._down = torch.arange(self._size[0], device=device)
        self._across = torch.arange(self._size[1], device=device)
        self.labelled = torch.ones((), device=device)
        self.select(0)

    def __len__(self) -> int:
        return len(self._padded)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self._padded.device

    def digest(self) -> str:
        """SHA-256, in hex, of all that the pixels of a view depend on: images, augmentation, normalisation,
        seed; not of how many views there are."""
        choices = (self.augment, self._margin, self._seed, self._scale)
        normalisation = (self._mean.flatten().tolist(), self._std.flatten().tolist())
        made = hashlib.sha256(repr((choices, normalisation, tuple(self._padded.shape))).encode())
        made.update(self._padded.cpu().numpy().data)
        return made.hexdigest()

    def of_epoch(self, epoch: int) -> int:
        """The view shown in an epoch."""
        return epoch % self.count if self.count else epoch

    def select(self, view: int) -> None:
        """Make `view` the one that `batch` shows. `labelled` is then 0 for a view of blends, else 1."""
        generator = torch.Generator().manual_seed((self._seed << 16) + view)
        samples = len(self)
        shift = torch.randint(0, 2 * self._margin + 1, (2, samples), generator=generator)
        self._rows.copy_(shift[0])
        self._columns.copy_(shift[1])
        flip = torch.randint(0, 2, (samples,), generator=generator).bool()
        if self._flips:
            self._flip.copy_(flip)
        if self.mixes:
            blended = view % 2 == 1
            share = torch.rand(samples, generator=generator)  # Beta(1, 1)
            partner = torch.randperm(samples, generator=generator)
            # Between a half and one: the image itself stays the stronger part, and its label the likelier.
            self._share.copy_(torch.maximum(share, 1 - share) if blended else torch.ones(samples))
            self._partner.copy_(partner)
            self.labelled.fill_(0.0 if blended else 1.0)
        if self._distortions is not None:
            self._distortions.draw(generator, _DISTORTED)

    def batch(self, index: Tensor) -> Tensor:
        """Normalised float32 (N, C, H, W) inputs of the samples `index` in the selected view."""
        pixels = self._pixels(index)
        if self.mixes:
            share = self._share[index][:, None, None, None]
            pixels = share * pixels + (1 - share) * self._pixels(self._partner[index])
        if self._distortions is not None:
            pixels = self._distortions.apply(pixels, index)
        return (pixels * self._scale - self._mean) / self._std

    def _pixels(self, index: Tensor) -> Tensor:
        if not self._margin and not self._flips:
            return self._padded[index].float()
        rows = self._rows[index][:, None] + self._down
        across = self._across.expand(len(index), -1)
        if self._flips:
            across = torch.where(self._flip[index][:, None], self._size[1] - 1 - across, across)
        columns = self._columns[index][:, None] + across
        samples = self._padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return samples.permute(0, 3, 1, 2).float()


class CachedTeacher:
    """Teacher logits per view, computed when a view is first met: exact, because views never change.

    Those of `others`, further teachers, are stored in columns beside those of the first. With a `store`, what
    was computed before is read from it. Several processes share the work, and each has all of the result.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        views: Views,
        batch_size: int = 256,
        others: Sequence[Callable[[Tensor], Tensor]] = (),
        store: LogitStore | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._teachers, self._views, self._batch_size = (logits, *others), views, batch_size
        self._store, self._ranks = store if views.count else None, ranks
        self._cache: dict[int, Tensor] = {}
        self._widths: tuple[int, ...] = ()

    def of(self, view: int) -> Tensor:
        """(N, classes) logits of all samples in a view, which is selected on return; with further teachers
        there are as many columns more as those have classes."""
        self._views.select(view)
        if view not in self._cache:
            if not self._views.count:  # every epoch has its own view: nothing is shown twice
                self._cache.clear()
            self._cache[view] = self._stored(view).to(self._views.device)
        return self._cache[view]

    def _stored(self, view: int) -> Tensor:
        """From the store, where it has them on all processes, else computed; the view is selected."""
        found = None if self._store is None else self._store.read(view)
        if self._store is not None and self._ranks.all(found is not None) and found is not None:
            self._widths = found[1]
            return found[0]
        parts = torch.split(torch.arange(len(self._views)), self._batch_size)
        answers = [self._ask(part) for part in parts[self._ranks.part(len(parts))]]
        made = self._ranks.collect(answers)
        self._widths = tuple(answer.shape[1] for answer in made[0])
        rows = torch.cat([torch.cat(answer, 1) for answer in made])
        if self._store is not None:
            self._store.write(view, rows, self._widths)
        return rows

    def _ask(self, part: Tensor) -> list[Tensor]:
        inputs = self._views.batch(part.to(self._views.device)).cpu()
        return [logits(inputs).cpu() for logits in self._teachers]  # processes on other devices read them

    def outputs(self, rows: Tensor) -> Outputs:
        """Rows of what `of` gave as outputs: the logits of further teachers are the exits."""
        first, *others = rows.split(self._widths or (rows.shape[1],), 1)
        return Outputs(first, exits=tuple(others))
