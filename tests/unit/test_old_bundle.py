"""A bundle of format 1, as edgekd 0.1.0 wrote it, is read by every later version. Never write it again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.bundle import verify_bundle
from edgekd.manifest import read_manifest
from edgekd.runtime import load

pytestmark = pytest.mark.backends
FOLDER = Path(__file__).parents[1] / "golden" / "bundle-v1"
# Pixel (y, x, channel) is (3 y + 5 x + 7 channel) mod 256; answers of the release that wrote the bundle.
LABELS = ["bag"]
PROBABILITIES = [[0.00037, 0.94999, 0.04963]]


def test_it_is_sound_and_its_manifest_is_read() -> None:
    assert verify_bundle(FOLDER) == []
    manifest = read_manifest(FOLDER)
    assert (manifest.version, manifest.name) == (1, "sample")
    assert [variant.id for variant in manifest.variants] == ["ort", "ov"]


@pytest.mark.parametrize("variant", ["ort", "ov"])
def test_its_golden_outputs_and_its_answers_are_the_same(variant: str) -> None:
    model = load(FOLDER, variant=variant, selftest=True)
    y, x, channel = np.indices((12, 15, 3))
    prediction = model.predict(((3 * y + 5 * x + 7 * channel) % 256).astype(np.uint8))
    assert prediction.labels == LABELS
    np.testing.assert_allclose(prediction.probabilities, PROBABILITIES, atol=2e-4)
