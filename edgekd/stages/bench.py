"""What several stages share: data, teacher, space. Loaded on first use, so a resumed run stays quick."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from edgekd.blocks import deployed
from edgekd.distillers import plain
from edgekd.errors import UsageError
from edgekd.files import sha256_json
from edgekd.logit_store import LogitStore
from edgekd.quantize.capture import capture
from edgekd.ranks import ALONE, Ranks
from edgekd.run import Run
from edgekd.sources import Dataset, load_dataset
from edgekd.sources.dataset import Request, stratified_split
from edgekd.spaces import Genome, SearchSpace, search_space
from edgekd.spec import ModelSpec
from edgekd.stages.curriculum import DEFAULT, SUGGEST, Phase, phases_of
from edgekd.stages.lesson import Classroom, prepare
from edgekd.stages.others import load_other, source_and_weights
from edgekd.stages.ready import model_spec, ready_teacher
from edgekd.stages.student import Blueprint, read_blueprint
from edgekd.stages.training_set import TrainingSet, training_set
from edgekd.tasks.classification import expected_calibration_error, fidelity, normalise, to_tensor
from edgekd.teacher import LoadedTeacher, Teacher, load_teacher
from edgekd.user_model import STUDENT, from_factory, load_weights
from edgekd.views import Views

Array = NDArray[np.float32]


class Bench:
    """The things on the table while a run works. `ranks`: the processes that train together."""

    def __init__(self, run: Run, ranks: Ranks = ALONE) -> None:
        self.run, self.ranks = run, ranks
        self.recipe = run.recipe
        torch.set_num_threads(max(1, run.recipe.threads))

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A progress function that names its subject."""
        return lambda done, total: self.run.reporter.step(what, done, total)

    @cached_property
    def loaded(self) -> LoadedTeacher:
        return load_teacher(self.recipe.teacher)

    @cached_property
    def data(self) -> Dataset:
        channels = self.loaded.channels
        size = self.recipe.data.image_size
        return load_dataset(
            self.recipe.data,
            seed=self.recipe.seed,
            image_size=(size, size) if size else self.loaded.image_size,
            color=None if channels is None else "grey" if channels == 1 else "rgb",
            cache=self.run.folder / "cache",
            progress=self.counter("read images"),
        )

    @cached_property
    def spec(self) -> ModelSpec:
        return model_spec(self.loaded, self.recipe.teacher, self.data.shape, self.data.classes)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, with its ONNX form beside it where it has one, in the fastest faithful runtime."""
        return self.ready(self.loaded, self.recipe.teacher.source)

    @cached_property
    def others(self) -> tuple[Teacher, ...]:
        """The further teachers."""
        named = self.recipe.teacher.others
        return tuple(self.ready(load_other(text, self.spec), source_and_weights(text)[0]) for text in named)

    def ready(self, loaded: LoadedTeacher, name: str) -> Teacher:
        """A network that teaches, in the fastest runtime that agrees with it."""
        return ready_teacher(
            loaded,
            name,
            self.spec,
            folder=self.run.folder / "checkpoints",
            inputs=self.validation_inputs[:256],
            threads=self.recipe.threads,
            say=self.run.reporter.say,
        )

    @cached_property
    def validation_inputs(self) -> Tensor:
        """Normalised float32 (N, C, H, W)."""
        return normalise(to_tensor(self.data.validation_images), self.spec.preprocessing)

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Indices of the images to train on and of those held out to choose between models."""
        train, selection = stratified_split(
            self.data.train_labels,
            self.recipe.data.selection_fraction,
            self.recipe.seed,
            self.data.classes,
            "held-out part",
        )
        return torch.from_numpy(train), torch.from_numpy(selection)

    @cached_property
    def labels(self) -> Tensor:
        """int64 labels of the images to train on, -1 where there is none."""
        return torch.from_numpy(self.training.labels)

    @cached_property
    def training(self) -> TrainingSet:
        """The images to train on: those of the data that are not held out, and the pool without labels."""
        height, width, channels = self.data.shape
        color, cache = "grey" if channels == 1 else "rgb", self.run.folder / "cache" / "unlabeled"
        request = Request(self.recipe.data, self.recipe.seed, (height, width), color, cache,
                          self.counter("read unlabelled images"))  # fmt: skip

        def answers(images: NDArray[np.uint8]) -> Array:
            return self.teacher.logits(normalise(to_tensor(images), self.spec.preprocessing)).numpy()

        train, held_out = (part.numpy() for part in self.split)
        return training_set(self.data, train, held_out, request, answers)

    @cached_property
    def selection(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the held-out part of the training images."""
        index = self.split[1]
        images = to_tensor(self.data.train_images[index.numpy()])
        return normalise(images, self.spec.preprocessing), torch.from_numpy(self.data.train_labels)[index]

    @cached_property
    def views(self) -> Views:
        return self.views_on("cpu")

    def views_on(self, device: str, augment: str | None = None, count: int | None = None) -> Views:
        """The views of the training images, in the memory of a device; None is what the recipe says."""
        images = to_tensor(self.training.images)
        data, stored = self.recipe.data, self.recipe.distill.views if count is None else count
        kind, margin = augment or data.augment, data.crop_margin or None
        return Views(images, self.spec.preprocessing, kind, stored, self.recipe.seed, device, margin)

    @cached_property
    def device(self) -> str:
        """Where training runs: a CUDA device where there is one, unless the recipe says otherwise."""
        wanted = self.recipe.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda': torch sees no CUDA device here", "--set device=cpu")
        return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"

    @cached_property
    def space(self) -> SearchSpace:
        """The space that is searched, restricted by the card."""
        return self.space_of(Blueprint(space=self.recipe.search.space))

    def space_of(self, blueprint: Blueprint) -> SearchSpace:
        """The space a genome belongs to: with the restrictions it was found under, else those of the card."""
        restrictions = self.run.target.space
        multiple = blueprint.channel_multiple or int(float(restrictions.channel_multiple.value))
        card = (restrictions.kernels, restrictions.forbidden_ops)
        kernels, forbidden = (blueprint.kernels, blueprint.forbidden_ops) if blueprint.kernels else card
        return search_space(blueprint.space, self.spec, multiple, tuple(kernels), tuple(forbidden))

    @property
    def blueprint(self) -> Blueprint:
        """The student that the search chose, or that was given."""
        return read_blueprint(self.run.folder / "2-student.json")

    @property
    def genome(self) -> Genome:
        """The student that the search chose; empty for one that a factory makes."""
        return self.blueprint.genome

    def untrained(self, blueprint: Blueprint, seed: int | None = None) -> nn.Module:
        """The network of a blueprint as it is trained, with fresh weights, the same for the same seed; None
        is the recipe's."""
        seed = self.recipe.seed if seed is None else seed
        if not blueprint.factory:
            generator = torch.Generator().manual_seed(seed)
            return self.space_of(blueprint).build(blueprint.genome, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a factory draws from the global generator
            return copy.deepcopy(from_factory(blueprint.factory, STUDENT))  # it may name a module

    @property
    def trainings(self) -> tuple[Phase, ...]:
        """The trainings of the student; with the method that was found, where the recipe asks for one."""
        distill = self.recipe.distill
        if distill.method == SUGGEST:
            found = self.run.record["metrics"].get("distill", {})
            method, options = found.get("method") or DEFAULT, found.get("options") or {}
            distill = msgspec.structs.replace(distill, method=method, options=options)
        return phases_of(distill, self.recipe.data.augment)

    def room(self, phase: Phase, teacher: Teacher) -> Classroom:
        """What the lesson of one training is planned from."""
        return Classroom(
            phase.recipe,
            teacher,
            self.spec,
            self.labels,
            self.recipe.seed,
            phase.mixes,
            self.others,
            self.logit_store,
            self.ranks,
        )

    def student(self) -> nn.Module:
        """The chosen student with its distilled weights, and with what its methods keep at inference."""
        model = self.untrained(self.blueprint)
        for phase in () if self.recipe.distill.weights else self.trainings:
            if not all(map(plain, phase.recipe.method.split("+"))):
                model = prepare(self.room(phase, self.teacher), model).deploy()
        model = deployed(model)
        load_weights(model, self.run.folder / "3-distilled.safetensors", STUDENT)
        return model.eval()

    @cached_property
    def captured(self) -> fx.GraphModule:
        """The distilled student as a graph with batch norm folded."""
        return capture(self.student(), self.spec.input_shape)

    @cached_property
    def teacher_logits(self) -> Array:
        """(N, classes) of the teacher on the validation images."""
        parts = [self.teacher.logits(part) for part in torch.split(self.validation_inputs, 256)]
        logits: Array = torch.cat(parts).numpy()
        return logits

    def fidelity(self, logits: Array) -> dict[str, float | None]:
        """How a model with these (N, classes) logits on the validation images agrees with the teacher;
        `None` where a figure is not defined."""
        labels = self.data.validation_labels
        found = fidelity(self.teacher_logits, logits, labels)
        found |= {"expected_calibration_error": expected_calibration_error(logits, labels)}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def logit_store(self, teachers: Sequence[Teacher], views: Views) -> LogitStore:
        """Where the logits of these teachers on these views are kept for a start after an interruption."""
        who = [teacher.sha256 for teacher in teachers]
        loaded = self.run.record["stages"]["teacher"]["inputs_sha256"]  # the teachers' code and files too
        return LogitStore(
            self.run.folder / "cache",
            f"logits-{sha256_json(who)[:8]}-{views.augment}",
            [who, loaded, views.digest()],
            self.run.reporter.say,
            writes=self.ranks.first,
        )
