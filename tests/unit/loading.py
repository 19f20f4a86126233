"""What the tests of the sources share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.recipe import DataRecipe
from edgekd.sources import Dataset, load_dataset

RNG = np.random.default_rng(0)


def load(path: Path | str, seed: int = 0, **options: Any) -> Dataset:
    recipe = {name: options.pop(name) for name in ("skip_bad", "validation_fraction") if name in options}
    return load_dataset(DataRecipe(source=str(path), **recipe), seed=seed, **options)


def refused(path: Path | str, *expected: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, **options)
    for text in expected:
        assert text in caught.value.message + " | " + caught.value.hint
    assert caught.value.exit_code == 11
    return caught.value


def pixels(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape)).astype(np.uint8)
