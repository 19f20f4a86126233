"""CIFAR-100 distillation anchors on one GPU: the published pairs and recipe, several runs side by side.

    python tools/bench/cifar100.py --data DATA --models MODELS --pair resnet56:resnet20 \
        --methods ce kd lskd dkd dist --seeds 0 1 2 --out cifar100.jsonl
    python tools/bench/cifar100.py --data DATA --models MODELS --pair resnet56:resnet20 --methods dkd --speed

DATA holds cifar100_train_{a25k,b25k}_q95.npz, cifar100_test.npz and load_shared.py; MODELS holds
cifar100_NAME_fp16.safetensors. Recipe: SGD 0.05, momentum 0.9, weight decay 5e-4 (weights only), batch 64,
240 epochs, a tenth of the rate at 150, 180 and 210, crops of 4 px and flips, new every epoch; accuracy of
the last epoch on the test images, and on the same images compressed as the training images here are
("accuracy_q95"). `--hold-out 5000` trains without that many training images and reports
accuracy on them instead, for choosing. `--jobs FILE` runs what the file says, one JSON object a line with
any of the fields of `Job`: pairs, schedules and augmentations side by side. `--speed` times one step eager,
as a CUDA graph, and compiled in a graph, in one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from cifar_resnet import CifarResNet
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from edgekd.distillers import Setting, methods
from edgekd.nets import Outputs, count_parameters
from edgekd.optimizer import Kind
from edgekd.plan import Plan
from edgekd.spec import Preprocessing
from edgekd.taps import Tapped, find_layout
from edgekd.tasks.classification import normalise
from edgekd.train import Stage, evaluate, fit_together
from edgekd.views import Views

PREPROCESSING = Preprocessing(32, 32, "rgb", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
MILESTONES = (150 / 240, 180 / 240, 210 / 240)
# The authors' own settings for these pairs where they differ from a method's defaults here.
OPTIONS: dict[str, dict[str, Any]] = {"dkd": {"warmup_epochs": 20}}


def load_module(path: Path) -> ModuleType:
    """A Python file that is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Cifar100:
    """uint8 (N, 3, 32, 32) images and int64 labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, folder: Path, hold_out: int) -> Cifar100:
        """`hold_out`: that many training images, evenly from all classes, stand in for the test images."""
        loader = load_module(folder / "load_shared.py")

        def read(*names: str) -> tuple[Tensor, Tensor]:
            parts = [loader.images(folder / name)[:2] for name in names]
            images = np.ascontiguousarray(np.concatenate([p[0] for p in parts]).transpose(0, 3, 1, 2))
            return torch.from_numpy(images), torch.from_numpy(
                np.concatenate([p[1] for p in parts]).astype(np.int64)
            )

        images, labels = read("cifar100_train_a25k_q95.npz", "cifar100_train_b25k_q95.npz")
        if not hold_out:
            return cls(images, labels, *read("cifar100_test.npz"))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        rank = torch.stack([(labels[order] == c).cumsum(0) for c in range(100)])[
            labels[order], torch.arange(len(order))
        ]
        held = order[rank <= hold_out // 100]
        kept = order[rank > hold_out // 100]
        return cls(images[kept], labels[kept], images[held], labels[held])


@cache
def as_training(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) through JPEG of quality 95 without chroma subsampling, as the training images."""

    def coded(image: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95, subsampling=0)
        return torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)

    return torch.stack([coded(image) for image in images])


@dataclass(frozen=True)
class Job:
    """One training. `method` "ce": from labels alone; `schedule`: "step", as published, or "cosine";
    `init`: "torch", its own, or "kaiming", normal by fan out, as published."""

    pair: str = "resnet56:resnet20"
    method: str = "kd"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "step"
    augment: str = "crop-flip"
    ema_decay: float = 0.0
    decay_all: bool = False
    bfloat16: bool = True
    init: str = "torch"
    optimizer: Kind = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 5e-4


@dataclass
class Bench:
    """The data, where the teachers are, and how to run."""

    data: Cifar100
    models: Path
    epochs: int
    plan: Plan
    batch_size: int = 64

    def teacher(self, name: str) -> nn.Module:
        """A published network; fresh for every training, because runs side by side keep their taps apart."""
        network = CifarResNet(name)
        weights = load_file(self.models / f"cifar100_{name}_fp16.safetensors")
        network.load_state_dict({key: value.float() for key, value in weights.items()})
        return network.eval()

    def stage(self, job: Job) -> Stage:
        """A training from a fresh student."""
        teacher_name, _, student_name = job.pair.partition(":")
        method, seed = job.method, job.seed
        torch.manual_seed(seed)
        student = CifarResNet(student_name)
        if job.init == "kaiming":
            for module in student.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        chosen = {name: OPTIONS.get(name, {}) | job.options.get(name, {}) for name in method.split("+")}
        parts = () if method == "ce" else methods(method, {k: v for k, v in chosen.items() if v})
        example = torch.zeros(2, 3, 32, 32)
        tapped = Tapped(
            student, find_layout(student, example, 100), sorted({t for p in parts for t in p.needs.student})
        )
        network, teacher = self.teacher(teacher_name), None
        if parts:
            wanted = sorted({t for p in parts for t in p.needs.teacher})
            teacher = Tapped(network, find_layout(network, example, 100), wanted)
        model: nn.Module = tapped
        with torch.no_grad():
            theirs = teacher.eval()(example) if teacher is not None else Outputs(torch.zeros(2, 100))
            for part in parts:
                model = part.wrap(model, model.eval()(example), teacher)
            ours = model.eval()(example)
        for part in parts:
            part.build(ours, theirs, Setting(len(self.data.labels), 100, self.data.labels, seed))
        return Stage(
            name="distill",
            model=model,
            views=Views(self.data.images, PREPROCESSING, job.augment, 0, seed, self.plan.device, margin=4),
            labels=self.data.labels,
            teacher=teacher,
            distillers=parts,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=job.learning_rate,
            weight_decay=job.weight_decay,
            ema_decay=job.ema_decay,
            seed=seed,
            plan=replace(self.plan, bfloat16=self.plan.bfloat16 and job.bfloat16),
            optimizer=job.optimizer,
            decay_all=job.decay_all,
            milestones=MILESTONES if job.schedule == "step" else (),
        )

    def deployed(self, stage: Stage) -> nn.Module:
        """The network that would be exported."""
        network: nn.Module = stage.model.deploy()  # type: ignore[operator]
        return network

    def accuracies(self, stage: Stage) -> dict[str, float]:
        """Top-1 of the exported student in percent, on the test images as they are, and compressed as the
        training images were."""
        network = self.deployed(stage).to(self.plan.device)
        kinds = {"accuracy": self.data.test_images, "accuracy_q95": as_training(self.data.test_images)}
        logits = {kind: evaluate(network, normalise(x, PREPROCESSING), 1000) for kind, x in kinds.items()}
        right = {kind: made.argmax(1) == self.data.test_labels for kind, made in logits.items()}
        return {kind: round(100 * float(hits.float().mean()), 2) for kind, hits in right.items()}


def train_all(bench: Bench, jobs: list[Job], out: Path | None) -> None:
    """All jobs together; one JSON line each."""
    begin = time.perf_counter()
    stages = [bench.stage(job) for job in jobs]

    def progress(what: str, done: int, total: int) -> None:
        if done % max(1, total // 20) == 0:
            rate = 1e3 * (time.perf_counter() - begin) / done
            print(f"{done}/{total} steps, {rate:.2f} ms each", file=sys.stderr, flush=True)

    histories = fit_together(stages, progress)
    seconds = time.perf_counter() - begin
    for job, stage, history in zip(jobs, stages, histories, strict=True):
        row = asdict(job) | {
            "epochs": bench.epochs, "batch_size": bench.batch_size, "images": len(bench.data.labels),
            **bench.accuracies(stage),
            "last_loss": round(history[-1]["loss"], 4), "seconds_together": round(seconds, 1),
            "ms_a_step_together": round(1e3 * history[-1]["seconds"] / stage.steps_per_epoch, 3),
            "runs_together": len(jobs), "parameters": count_parameters(bench.deployed(stage)),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def speed(bench: Bench, job: Job, steps: int = 200) -> None:
    """Milliseconds a step of three plans, interleaved, the median of five rounds."""
    from edgekd.loop import Loop

    plans = {
        "eager f32": replace(bench.plan, bfloat16=False, graphed=False, compiled=False),
        "eager": replace(bench.plan, graphed=False, compiled=False),
        "graph": replace(bench.plan, graphed=True, compiled=False),
        "graph + compile": replace(bench.plan, graphed=True, compiled=True),
    }
    loops: dict[str, Loop] = {}
    for name, plan in plans.items():
        loop = Loop(replace(bench, plan=plan, epochs=100).stage(job))
        loop.open_epoch(0)
        for _ in range(10):
            loop.step()
        loops[name] = loop
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(5):
        for name, loop in loops.items():
            loop.open_epoch(0)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                loop.step()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / steps * 1e3)
    medians = {name: round(float(np.median(values)), 3) for name, values in times.items()}
    ratio = round(medians["eager f32"] / medians["graph + compile"], 2)
    print(json.dumps(asdict(job) | {"ms_a_step": medians, "eager f32 over best": ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--pair", default="resnet56:resnet20", help="TEACHER:STUDENT")
    parser.add_argument("--methods", nargs="+", default=["kd"])
    parser.add_argument("--options", default="{}", help="JSON, options by method name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=240)
    parser.add_argument("--together", type=int, default=6, help="runs side by side on the device")
    parser.add_argument("--jobs", type=Path, help="JSON lines, instead of --pair, --methods and --seeds")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    data = Cifar100.load(arguments.data, arguments.hold_out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan(bfloat16=True, device=device, graphed=device == "cuda", compiled=arguments.compile)
    bench = Bench(data, arguments.models, arguments.epochs, plan, arguments.batch_size)
    options = json.loads(arguments.options)
    if arguments.jobs is not None:
        lines = arguments.jobs.read_text().splitlines()
        jobs = [Job(**json.loads(line)) for line in lines if line.strip()]
    else:
        jobs = [
            Job(arguments.pair, method, seed, options)
            for seed in arguments.seeds
            for method in arguments.methods
        ]
    if arguments.speed:
        for job in jobs:
            speed(bench, job)
        return
    for start in range(0, len(jobs), arguments.together):
        train_all(bench, jobs[start : start + arguments.together], arguments.out)


if __name__ == "__main__":
    main()
