"""A teacher made ready to teach: fine-tuned so that what it says of an image differs more within a class.

MCMI, Ye et al. 2024 (arXiv:2401.08732; the authors' CE_KL_loss): ``CE(z, y) - lambda * mean KL(p || Q_y)``.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs, count_parameters, wide
from edgekd.plan import Plan
from edgekd.stages.bench import Bench
from edgekd.stages.training import choose_plan
from edgekd.teacher import LoadedTeacher, Teacher, check_teacher
from edgekd.train import Stage, evaluate, fit
from edgekd.views import Views

_BATCH, _WEIGHT_DECAY = 64, 5e-4  # the authors'


def conditional_information(logits: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """CMI, ``mean_n KL(softmax(logits_n) || centroids[labels_n])`` in nats over the samples with a label.

    `logits` (N, classes), `labels` int64 (N,), -1 where there is none, `centroids` (classes, classes), one
    distribution a row.
    """
    log_p = F.log_softmax(wide(logits), 1)
    log_q = centroids.log().index_select(0, labels.clamp(min=0))
    known = labels >= 0
    each = (log_p.exp() * (log_p - log_q)).sum(1) * known
    return each.sum() / known.sum().clamp(min=1)


def class_centroids(logits: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes): row y is the mean of softmax(logits) over the samples of label y. A class without
    samples has an even row."""
    p, classes = torch.softmax(wide(logits), 1), logits.shape[1]
    known = labels >= 0
    sums = p.new_zeros(classes, classes).index_add_(0, labels[known], p[known])
    counts = torch.bincount(labels[known], minlength=classes)[:, None]
    means = torch.where(counts > 0, sums / counts.clamp(min=1), 1 / classes)
    return means.clamp(min=1e-12)  # the logarithm of a probability that is too small for its type


class Mcmi(Distiller):
    """``-KL(p_n || Q_y)`` on the network's own logits, beside the cross-entropy; its weight is lambda. The
    centroids stay as they were at the start, as in the authors' code."""

    needs = Needs(teacher=(), labels=True)
    centroids: Tensor

    def __init__(self, centroids: Tensor, weight: float) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.weight = weight

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return -conditional_information(student.logits, batch.labels, self.centroids)


def check_preparable(bench: Bench) -> nn.Module:
    """The network that can be fine-tuned.

    Raises:
        UsageError: the teacher is a black box, or no training image has a label.
    """
    network = bench.teacher.model
    if network is not None and bool((bench.labels >= 0).any()):
        return network
    reason = f"'{bench.teacher.name}' is a black box, whose weights cannot be trained"
    if network is not None:
        reason = "no training image has a label"
    raise UsageError(
        f"distill.prepare 'mcmi' fine-tunes the teacher, and {reason}",
        "leave distill.prepare out, or bring a torch teacher (package.module:factory) and labels",
    )


def prepared_teacher(bench: Bench, key: str) -> tuple[Teacher, dict[str, Any]]:
    """The fine-tuned teacher and what the record says of it; `key` tells checkpoints apart. What accuracies
    are compared with stays the teacher as it was given.

    Raises:
        UsageError: see `check_preparable`.
        TeacherError: the teacher has forgotten the data.
    """
    recipe, given = bench.recipe.distill, bench.teacher
    network = copy.deepcopy(check_preparable(bench)).requires_grad_()
    checkpoint = bench.run.folder / "checkpoints" / f"prepare-{key}.pt"
    plan, _ = choose_plan(bench, network, checkpoint, _BATCH)
    augment = bench.recipe.data.augment.removesuffix("-mix")
    views = bench.views_on(plan.device, augment)
    before = _information(network, views, bench.labels, plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.recipe.seed)  # of dropout
        centroids = class_centroids(_answers(network, views, plan, training=True), bench.labels)
    history = fit(
        Stage(
            name="prepare the teacher",
            model=network,
            views=views,
            labels=bench.labels,
            teacher=None,
            distillers=(Mcmi(centroids, recipe.prepare_weight),),
            epochs=recipe.prepare_epochs,
            batch_size=_BATCH,
            learning_rate=recipe.prepare_learning_rate,
            weight_decay=_WEIGHT_DECAY,
            ema_decay=0.0,
            seed=bench.recipe.seed,
            plan=plan,
            checkpoint=checkpoint,
            selection=bench.selection,
            optimizer="sgd",
            warmup_share=0.0,
            rate_key="distill.prepare_learning_rate",
            ranks=bench.ranks,
        ),
        bench.run.reporter.step,
    )
    teacher = taught_network(bench, network, f"{given.name}, prepared with mcmi")
    logits = evaluate(network, bench.validation_inputs, device=bench.device)
    right = check_teacher(teacher, logits, bench.data.validation_labels)
    facts = {
        "method": "mcmi",
        "cmi_before": before,
        "cmi_after": _information(network, views, bench.labels, plan),
        "accuracy_before": bench.run.record["metrics"]["teacher"]["accuracy"],
        "accuracy_after": right,
        "history": history,
    }
    bench.run.reporter.say(
        f"  teacher prepared: {100 * facts['accuracy_before']:.2f} to {100 * right:.2f} %, information "
        f"within a class {before:.3g} to {facts['cmi_after']:.3g} nats"
    )
    return teacher, facts


def taught_network(bench: Bench, network: nn.Module, name: str) -> Teacher:
    """A trained network of this run as a teacher."""
    from safetensors.torch import save

    state = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    digest, size = hashlib.sha256(save(state)).hexdigest(), 4 * count_parameters(network) / 2**20
    return bench.ready(LoadedTeacher(network.eval(), None, digest, size), name)


def _information(network: nn.Module, views: Views, labels: Tensor, plan: Plan) -> float:
    """CMI of a network in eval mode on the first view of the training images, with centroids of its own."""
    logits = _answers(network, views, plan)
    return float(conditional_information(logits, labels, class_centroids(logits, labels)))


def _answers(network: nn.Module, views: Views, plan: Plan, *, training: bool = False) -> Tensor:
    """(N, classes) float32 logits of a copy of the network on the first view, on the CPU."""
    views.select(0)
    placed = plan.place(copy.deepcopy(network)).train(training)
    with torch.no_grad(), plan.active():
        rows = [placed(plan.arrange(views.batch(part))).float().cpu() for part in _parts(views)]
    return torch.cat(rows)


def _parts(views: Views) -> Iterator[Tensor]:
    """Sample numbers in batches; the last one joins a full one, because batch norm needs more than one."""
    samples = torch.arange(len(views), device=views.device)
    return iter(torch.tensor_split(samples, max(1, len(views) // _BATCH)))
