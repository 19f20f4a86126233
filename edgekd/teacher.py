"""Stage 1: load a teacher and find out whether it knows this data.

A teacher is data unless the user names a factory (`edgekd.user_model`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.backends import Session, backend
from edgekd.backends.feeds import TO_SHRINK, too_large
from edgekd.errors import BackendError, MissingExtraError, TeacherError, missing_extra
from edgekd.files import sha256_file, sha256_json
from edgekd.nets import Outputs, count_macs, count_parameters, tapped_forward
from edgekd.recipe import TeacherRecipe
from edgekd.spec import ModelSpec
from edgekd.tasks.classification import top1_agreement
from edgekd.user_model import TEACHER, from_factory, load_weights, read_state

log = logging.getLogger(__name__)
Array = NDArray[np.float32]


@dataclass
class Teacher:
    """A trained classifier: a torch module, or only an ONNX file (a black box with logits)."""

    name: str
    spec: ModelSpec
    sha256: str
    size_mib: float
    model: nn.Module | None
    onnx: Path | None = None
    runtime: str = "torch f32"
    logits_max_abs_diff: float = 0.0
    batch: int | None = None  # images per call where the file fixes it
    _session: Session | None = field(default=None, repr=False)

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, classes) float32 of normalised (N, C, H, W) inputs, by the fastest runtime found faithful."""
        if self._session is not None:
            return torch.from_numpy(run_in_batches(self._session, inputs.contiguous().numpy(), self.batch))
        return self.outputs(inputs).logits

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Outputs:
        """Logits and, of a torch teacher, features and embedding."""
        if self.model is None:
            return Outputs(self.logits(inputs))
        return tapped_forward(self.model, inputs, len(self.spec.classes))

    @property
    def parameters(self) -> int | None:
        return None if self.model is None else count_parameters(self.model)

    @property
    def macs(self) -> int | None:
        if self.model is not None:
            return count_macs(self.model, self.spec.input_shape)
        from edgekd.backends.macs import compute_nodes

        return None if self.onnx is None else sum(node.macs for node in compute_nodes(self.onnx))


@dataclass(frozen=True)
class LoadedTeacher:
    """What a loader returns before the data is known."""

    model: nn.Module | None
    onnx: Path | None
    sha256: str
    size_mib: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    batch: int | None = None  # of an ONNX file with a fixed batch axis
    classes: tuple[str, ...] = ()  # of an ONNX file that names them
    outputs: int | None = None  # of an ONNX file: how many classes, where its graph says so


def load_teacher(recipe: TeacherRecipe, classes: int | None = None) -> LoadedTeacher:
    """The teacher a recipe names.

    Raises:
        TeacherError: it cannot be found or its weights do not fit; MissingExtraError: a package is missing.
    """
    source = recipe.source
    prefix, _, name = source.partition(":")
    if source == "demo":
        return _demo()
    if source.endswith(".onnx"):
        return _onnx(Path(source))
    loaders: dict[str, Callable[[str, TeacherRecipe], LoadedTeacher]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
    }
    if prefix in loaders and name:
        return loaders[prefix](name, recipe)
    if name:
        return _factory(recipe)
    raise TeacherError(
        f"teacher '{source}' is none of the known forms",
        "use package.module:factory, timm:NAME, torchvision:NAME, transformers:PATH or a .onnx file",
    )


def _demo() -> LoadedTeacher:
    from edgekd.demo import DemoTeacher, demo_folder

    path = demo_folder() / "teacher.safetensors"
    model = DemoTeacher()
    load_weights(model, path, TEACHER)
    return LoadedTeacher(
        model.eval(), None, sha256_file(path), _float_mib(model), (0.2860,), (0.3530,), (28, 28), 1
    )


def _factory(recipe: TeacherRecipe) -> LoadedTeacher:
    model = from_factory(recipe.source, TEACHER)
    if recipe.weights:
        load_weights(model, Path(recipe.weights), TEACHER)
    return LoadedTeacher(model.eval(), None, _module_digest(model), _float_mib(model))


def _timm(name: str, recipe: TeacherRecipe) -> LoadedTeacher:
    try:
        import timm
    except ImportError as error:
        raise missing_extra("timm", "timm", f"teacher 'timm:{name}'") from error
    try:
        model = timm.create_model(name, pretrained=not recipe.weights)
        if recipe.weights:
            model.reset_classifier(_stored_classes(model.pretrained_cfg["classifier"], recipe.weights))
    except (RuntimeError, OSError, ValueError) as error:
        raise TeacherError(
            f"teacher 'timm:{name}': {error}", "timm.list_models() names the known ones"
        ) from error
    if recipe.weights:
        load_weights(model, Path(recipe.weights), TEACHER)
    config = model.pretrained_cfg
    channels, *size = config["input_size"]
    return LoadedTeacher(
        model.eval(), None, _module_digest(model), _float_mib(model),
        tuple(config["mean"]), tuple(config["std"]), (size[0], size[1]), channels,
    )  # fmt: skip


def _torchvision(name: str, recipe: TeacherRecipe) -> LoadedTeacher:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise missing_extra("torchvision", "torchvision", f"teacher 'torchvision:{name}'") from error
    try:
        weights = models.get_model_weights(name).DEFAULT
        if recipe.weights:
            blank = models.get_model(name, weights=None)
            last = [key for key, module in blank.named_modules() if isinstance(module, nn.Linear)][-1]
            model = models.get_model(name, weights=None, num_classes=_stored_classes(last, recipe.weights))
        else:
            model = models.get_model(name, weights=weights)
        transforms = weights.transforms()
    except (ValueError, OSError, RuntimeError) as error:
        raise TeacherError(f"teacher 'torchvision:{name}': {error}") from error
    if recipe.weights:
        load_weights(model, Path(recipe.weights), TEACHER)
    size = transforms.crop_size[0]
    return LoadedTeacher(
        model.eval(), None, _module_digest(model), _float_mib(model),
        tuple(transforms.mean), tuple(transforms.std), (size, size), 3,
    )  # fmt: skip


def _stored_classes(classifier: str, weights: str) -> int:
    """How many classes the classifier layer of a stored state dict has."""
    state, key = read_state(Path(weights), TEACHER), f"{classifier}.weight"
    if key not in state:
        raise TeacherError(f"weights {weights}: no tensor '{key}', the classifier of this architecture")
    return len(state[key])


class _LogitsOnly(nn.Module):
    """A transformers classifier as a plain function of pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def _transformers(name: str, recipe: TeacherRecipe) -> LoadedTeacher:
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise missing_extra("transformers", "transformers", f"teacher 'transformers:{name}'") from error
    try:
        model = AutoModelForImageClassification.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"teacher 'transformers:{name}': {error}", "a local folder works offline"
        ) from error
    size = processor.size.get("height") or processor.size["shortest_edge"]
    wrapped = _LogitsOnly(model.eval())
    return LoadedTeacher(
        wrapped, None, _module_digest(wrapped), _float_mib(wrapped),
        tuple(processor.image_mean), tuple(processor.image_std), (size, size), 3,
    )  # fmt: skip


def _onnx(path: Path) -> LoadedTeacher:
    if not path.is_file():
        raise TeacherError(f"teacher {path}: no such file")
    if problem := too_large(path):
        raise TeacherError(f"teacher {problem}", TO_SHRINK)
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise TeacherError(f"teacher {path}: not a valid ONNX model: {error}") from error
    except Exception as error:  # protobuf's own error class is not public
        raise TeacherError(f"teacher {path}: not an ONNX file: {error}") from error
    inputs = [i for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4:
        raise TeacherError(
            f"teacher {path}: expected one input (N, C, H, W), got {[i.name for i in inputs]}: {shape}"
        )
    size = (shape[2], shape[3]) if shape[2] and shape[3] else None
    stated = {entry.key: entry.value for entry in model.metadata_props}
    try:  # a file of edgekd's own tells what it was trained with; others may use the keys for other things
        preprocess, classes = json.loads(stated["preprocess"]), tuple(json.loads(stated["labels"]))
        mean, std = tuple(map(float, preprocess["mean"])), tuple(map(float, preprocess["std"]))
    except (KeyError, TypeError, ValueError):
        mean, std, classes = (), (), ()
    last = model.graph.output[0].type.tensor_type.shape.dim
    return LoadedTeacher(
        None,
        path,
        sha256_file(path),
        path.stat().st_size / 2**20,
        mean,
        std,
        image_size=size,
        channels=shape[1] or None,
        batch=shape[0] or None,
        classes=classes,
        outputs=(last[-1].dim_value or None) if len(last) else None,
    )


def _module_digest(model: nn.Module) -> str:
    import hashlib

    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256_json([type(model).__qualname__, digest.hexdigest()])


def _float_mib(model: nn.Module) -> float:
    return 4 * count_parameters(model) / 2**20


def check_teacher(teacher: Teacher, logits: Tensor, labels: NDArray[np.int64]) -> float:
    """Accuracy of a teacher on validation logits (N, classes).

    Raises:
        TeacherError: the class count differs, or accuracy is within three standard errors, or 5 % of
            the way to perfect, of always naming the most frequent class.
    """
    classes = len(teacher.spec.classes)
    if logits.shape[1] != classes:
        raise TeacherError(
            f"the teacher '{teacher.name}' has {logits.shape[1]} outputs, the data has {classes} classes: "
            + ", ".join(teacher.spec.classes[:12]),
            "use the data the teacher was trained on, with the same class folders",
        )
    right = float((logits.argmax(1).numpy() == labels).mean())
    chance = float(np.bincount(labels, minlength=classes).max() / len(labels))
    if right <= chance + max(3 * math.sqrt(chance * (1 - chance) / len(labels)), 0.05 * (1 - chance)):
        raise TeacherError(
            f"the teacher '{teacher.name}' gets {100 * right:.1f} % of {len(labels)} validation images "
            f"right; chance is {100 * chance:.1f} %",
            "check its weights, the class order of the data and the normalisation (--mean, --std)",
        )
    return right


def run_in_batches(session: Session, inputs: Array, batch: int | None) -> Array:
    """Logits of all `inputs`; a file with a fixed batch gets exactly that many images a call."""
    if batch is None:
        return session.run(inputs)
    missing = -len(inputs) % batch
    padded = np.concatenate([inputs, np.repeat(inputs[:1], missing, 0)])
    parts = [session.run(padded[i : i + batch]) for i in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(inputs)]


def use_fastest_runtime(teacher: Teacher, inputs: Tensor, threads: int) -> None:
    """Open the teacher's ONNX file in the fastest runtime whose logits agree; otherwise torch stays, and the
    file is not used further.

    OpenVINO in bf16 comes first where the processor has it, then f32; accepted at 99 % top-1 agreement and
    a maximal difference of a tenth of the logits' range on `inputs`.
    """
    if teacher.onnx is None:
        return
    exact: Array | None = None
    reason = "logits differ between precisions"
    if teacher.model is not None:
        exact = tapped_forward(teacher.model, inputs, len(teacher.spec.classes)).logits.detach().numpy()
    for name, precision in (("openvino", "bf16"), ("openvino", "f32"), ("onnxruntime", "f32")):
        try:
            engine = backend(name)
            if precision not in engine.precisions():
                continue
            session = engine.open(teacher.onnx, threads=threads, precision=precision)
            got = run_in_batches(session, inputs.numpy(), teacher.batch)
            if exact is None:
                plain = engine.open(teacher.onnx, threads=threads)
                exact = run_in_batches(plain, inputs.numpy(), teacher.batch)
        except (MissingExtraError, BackendError) as error:
            log.info("teacher runtime %s %s: %s", name, precision, error.message)
            reason = error.message
            continue
        difference = float(np.abs(got - exact).max())
        if top1_agreement(got, exact) >= 0.99 and difference <= 0.1 * float(np.ptp(exact)):
            teacher._session = session
            teacher.runtime = f"{name} {precision}"
            teacher.logits_max_abs_diff = difference
            return
    if teacher.model is None:
        raise TeacherError(
            f"no runtime here can run {teacher.onnx}: {reason}",
            "the input must be float32 (N, C, H, W); python -m pip install 'edgekd[onnxruntime,openvino]'",
        )
    teacher.onnx = None
