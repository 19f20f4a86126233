"""Calibration reads its images a batch at a time, however many there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.samples import Samples
from edgekd.run import Silent
from edgekd.stages.onnx_job import Job

from .file_models import cnn, pictures

pytestmark = pytest.mark.backends
_IMAGES, _SIZE = 5000, 96  # 5,000 decoded images of 96 pixels are 527 MiB of float32
_CAP_MIB = 120
_CHILD = """
import json, resource, sys
import numpy as np
from pathlib import Path
from edgekd.quantize.observe import observe
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.samples import Pixels, digest, load_samples

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

model = load_float(Path(sys.argv[1]))
samples = load_samples(sys.argv[2], model, Pixels())
tensors = ["x", "ar"]
observe(model.model, tensors, lambda: samples.batches(np.arange(64), 16))
before = peak()
seen = observe(model.model, tensors, lambda: samples.batches(np.arange(samples.count), 16))
print(json.dumps({"count": samples.count, "before": before, "after": peak(), "high": seen["x"].high,
                  "values": float(seen["x"].histogram.sum())}))
"""


def test_five_thousand_images_need_the_memory_of_a_few(tmp_path: Path) -> None:
    """Peak memory of a process that observed 64 images, and then 5,000."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(pictures(20)):
        image = Image.fromarray(pixels).resize((_SIZE, _SIZE))
        image.save(folder / f"{number:05d}.jpg", quality=80)
    originals = sorted(folder.iterdir())
    for number in range(len(originals), _IMAGES):
        (folder / f"{number:05d}.jpg").hardlink_to(originals[number % len(originals)])
    model = cnn(tmp_path / "m.onnx", shape=("N", 3, _SIZE, _SIZE))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(model), str(folder)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["count"] == _IMAGES
    assert told["after"] - told["before"] < _CAP_MIB
    assert told["values"] >= _IMAGES * np.log(_SIZE)  # every batch was counted


def test_a_call_takes_fewer_samples_of_a_network_with_large_maps(tmp_path: Path) -> None:
    """Seven maps of 16 x 512 x 512 numbers are 112 MiB a sample; 384 MiB are looked at together."""
    pixels = {size: cnn(tmp_path / f"{size}.onnx", shape=("N", 3, size, size)) for size in (16, 1024)}
    for size, most in ((16, 16), (1024, 3)):
        model = load_float(pixels[size])
        nothing = Samples(0, lambda rows: {}, None, "none")
        assert Job(model, nothing, tmp_path, Silent(), 0, 8).batch_size == most
