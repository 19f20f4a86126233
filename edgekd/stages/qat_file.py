"""Quantization-aware training of an ONNX file, with its own float graph as the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.distillers import Context, Distiller, Setting, methods, refuse_unmet
from edgekd.errors import UnsupportedModelError
from edgekd.files import sha256_json
from edgekd.nets import Batch, Outputs
from edgekd.plan import Plan
from edgekd.quantize.post_training import Quantized
from edgekd.quantize.samples import digest
from edgekd.quantize.twin import Twin
from edgekd.stages.onnx_choice import Training
from edgekd.stages.onnx_job import Job
from edgekd.train import Stage, fit, load_checkpoint
from edgekd.views import CachedTeacher, Views

_TOLERANCE = 1e-3  # of the largest output; what torch and ONNX Runtime may differ by in float


class _SampleViews(Views):
    """Samples of the command as the training loop reads them: one view, nothing augmented."""

    def __init__(self, job: Job, rows: NDArray[np.int64]) -> None:
        self.count, self.augment, self.mixes = 1, "none", False
        self.labelled = torch.zeros(())
        self._job, self._chosen, self._name = job, rows, job.model.inputs[0].name

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def select(self, view: int) -> None:
        """There is one."""

    def batch(self, index: Tensor) -> Tensor:
        """The inputs of these samples."""
        feeds = self._job.samples.read(self._chosen[index.numpy()])
        return torch.from_numpy(np.ascontiguousarray(feeds[self._name]))


class _OutputError(Distiller):
    """Of an output that is no classification: squared error over the squared signal of the batch."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        signal = teacher.logits.square().sum().clamp(min=1e-12)
        error: Tensor = (student.logits - teacher.logits).square().sum() / signal
        return error


def check_trainable(job: Job, training: Training) -> None:
    """Refuse what cannot be trained before any work.

    Raises:
        UnsupportedModelError: operators without a torch form; torch computes something else; samples that
            are whole calls.
        UsageError: a method that needs more than the logits of a float graph.
    """
    if job.samples.whole_calls:
        raise UnsupportedModelError(
            "--qat: samples that hold one whole call each cannot be drawn into batches",
            "leave --qat out: post-training works",
        )
    parts = methods(training.method, training.options)
    refuse_unmet(parts, teacher_taps=("logits",), student_taps=("logits",), labels=False)
    feeds = next(iter(job.batches(job.parts.choice)))
    twin, name = Twin(job.model.model).eval(), job.model.inputs[0].name
    try:
        with torch.no_grad():
            got = twin(torch.from_numpy(feeds[name])).numpy()
    except (RuntimeError, IndexError, TypeError) as error:
        raise UnsupportedModelError(
            f"--qat: the graph cannot be trained: torch cannot compute it: {str(error).splitlines()[0]}",
            "leave --qat out: post-training works",
        ) from error
    exact = job.exact["choice"][: len(got)]
    difference = float(np.abs(got - exact).max()) if got.shape == exact.shape else float("inf")
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(exact).max())):
        raise UnsupportedModelError(
            f"--qat: the graph cannot be trained: in torch its output differs by {difference:.3g} from ONNX "
            f"Runtime's, whose largest value is {float(np.abs(exact).max()):.3g}",
            "leave --qat out: post-training works",
        )


def train_file(job: Job, base: Quantized, training: Training, seed: int) -> Quantized:
    """The graph of `base`, all in integers, after training; a further candidate. A start after an
    interruption goes on with the last whole epoch.

    Raises:
        StorageError: its checkpoint is damaged.
    """
    assert base.work is not None and base.numbers is not None
    source = base.work.model.model
    probabilities = _ends_in_softmax(source)
    twin = Twin(source)
    twin.quantize(base.work.places, base.numbers, base.work.scheme.weight_max)
    rows = job.parts.train
    batch = job.model.batch or min(training.batch_size, len(rows))
    rows = rows[: len(rows) // batch * batch]
    views = _SampleViews(job, rows)
    classes = job.exact["choice"].shape[-1]
    labels = torch.full((len(rows),), -1)
    distillers: tuple[Distiller, ...] = (_OutputError(),)
    if job.kind != "error":
        distillers = methods(training.method, training.options)
        blank = Outputs(torch.zeros(2, classes))
        for one in distillers:
            one.build(blank, blank, Setting(len(rows), classes, labels, seed))
    model = _Logits(twin, probabilities)
    checkpoint = job.folder.parent / "checkpoints" / f"{base.dialect}-{_key(job, base, training, seed)}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    stored = load_checkpoint(checkpoint)
    if stored is not None:
        job.reporter.say(f"  {base.dialect}: training goes on after epoch {len(stored['history'])}")
    history = fit(
        Stage(
            name="quantize",
            model=model,
            views=views,
            labels=labels,
            teacher=CachedTeacher(_float_logits(job, source, probabilities), views, batch),
            distillers=distillers,
            epochs=training.epochs,
            batch_size=batch,
            learning_rate=training.learning_rate,
            weight_decay=1e-4,
            ema_decay=0.99,
            seed=seed,
            plan=Plan(channels_last=False),
            hard_weight=0.0,
            checkpoint=checkpoint,
        ),
        job.reporter.step,
    )
    numbers = twin.eval().numbers()
    made = base.work.write(numbers)
    taught = training.method if job.kind != "error" else "squared error"
    how = f"{base.how}, then {training.epochs} epochs of training by the float graph ({taught})"
    losses = f"loss {history[0]['loss']:.4g} to {history[-1]['loss']:.4g}"
    job.reporter.say(f"  {base.dialect}: trained on {len(rows)} samples: {losses}")
    return replace(base, model=made, how=how, trained=True, sensitivity=(), numbers=numbers)


def _key(job: Job, base: Quantized, training: Training, seed: int) -> str:
    """Twelve letters of all that the training depends on, so that only the same one is continued."""
    assert base.numbers is not None
    grids = {name: asdict(grid) for name, grid in base.numbers.grids.items()}
    read = digest(job.samples, job.parts.train, job.batch_size)
    return sha256_json([job.model.sha256, base.how, grids, asdict(training), seed, read])[:12]


class _Logits(torch.nn.Module):
    """Logits of a twin; of one that gives probabilities, their logarithm."""

    def __init__(self, twin: Twin, probabilities: bool) -> None:
        super().__init__()
        self.twin, self._probabilities = twin, probabilities

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.twin(inputs)
        return made.clamp(min=1e-6).log() if self._probabilities else made


def _ends_in_softmax(model: onnx.ModelProto) -> bool:
    last = model.graph.output[0].name
    return any(node.op_type == "Softmax" and last in node.output for node in model.graph.node)


def _float_logits(job: Job, model: onnx.ModelProto, probabilities: bool) -> Callable[[Tensor], Tensor]:
    session = OnnxRuntimeBackend().open_graph(model.SerializeToString(), optimize=True)
    first, name = job.model.outputs[0].name, job.model.inputs[0].name

    def logits(inputs: Tensor) -> Tensor:
        made = torch.from_numpy(session.run({name: inputs.numpy()})[first])
        return made.clamp(min=1e-6).log() if probabilities else made

    return logits
