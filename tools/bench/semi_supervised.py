"""Two situations in which an ordinary loss is not enough, on CIFAR-100, each with three seeds.

    OMP_NUM_THREADS=1 python tools/bench/semi_supervised.py --case labels --data DATA --models MODELS
    OMP_NUM_THREADS=1 python tools/bench/semi_supervised.py --case black-box --data DATA --models MODELS

- labels: a tenth of the training images has a label, all have a teacher. DHO, with a head for the labels and
  one for the teacher, against KD with one head: at its published weights, and at those of DHO (temperature 2,
  labels 0.5, teacher 1).
- black-box: the teacher is an ONNX file and another kind of network than the student, which is made of
  depthwise convolutions. OFA, whose exits learn from the logits too, against KD.

DATA holds cifar100_train_{a25k,b25k}_q95.npz, cifar100_test.npz and load_shared.py; MODELS holds
cifar100_resnet56_fp16.safetensors. All trainings of a case have the same images, views, epochs, optimiser and
schedule, those of one seed the same first weights and order. Default options, nothing tuned. Accuracy of the
last epoch on the test images. On a CUDA device all trainings of a case run side by side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from cifar100 import PREPROCESSING
from cifar_resnet import CifarResNet
from torch import nn
from trainings import (
    LABELS_ALONE,
    Course,
    Job,
    add_options,
    choose_plan,
    per_class,
    read_part,
    table,
    teacher_of,
    train_in_processes,
    write_summary,
)

from edgekd.nets import count_macs, count_parameters
from edgekd.recipe import DistillRecipe
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec
from edgekd.tasks.classification import normalise
from edgekd.user_model import TEACHER, load_weights

# Inverted residuals with depthwise convolutions in every stage.
DEPTHWISE = (2, 0, 0, 2, 1, 0, 1, 0, 2, 1, 0, 1, 0, 2, 1, 0, 1, 1)


def student_of(case: str, spec: ModelSpec) -> Callable[[], nn.Module]:
    """What builds a fresh student from the global generator."""
    if case == "labels":
        return lambda: CifarResNet("resnet8", len(spec.classes))
    space = search_space("mobile-cnn", spec, 8, (3, 5))
    return lambda: space.build(DEPTHWISE, torch.default_generator)


def course(arguments: argparse.Namespace) -> Course:
    """Images, of which a share has labels, and the teacher in the form that the case asks for."""
    names = ("cifar100_train_a25k_q95.npz", "cifar100_train_b25k_q95.npz")
    images, labels, classes = read_part(arguments.data, names, arguments.images)
    test_images, test_labels, _ = read_part(arguments.data, ["cifar100_test.npz"], arguments.test_images)
    if arguments.case == "labels":
        known = per_class(labels, round(arguments.labelled * len(labels) / len(classes)), 1)
        labels = torch.full_like(labels, -1).index_copy_(0, known, labels[known])
    spec = ModelSpec(PREPROCESSING, classes)
    network = CifarResNet("resnet56", len(classes))
    load_weights(network, arguments.models / "cifar100_resnet56_fp16.safetensors", TEACHER)
    example = normalise(test_images[:256], PREPROCESSING)
    teacher = teacher_of("resnet56", network, spec, example, black_box=arguments.case == "black-box")
    return Course(
        spec=spec,
        images=images,
        labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        teacher=teacher,
        student=student_of(arguments.case, spec),
        recipe=DistillRecipe(epochs=arguments.epochs, views=arguments.views),
    )


def jobs_of(case: str, seeds: list[int]) -> list[Job]:
    """Names of rows, methods and their options."""
    jobs: list[Job] = []
    for seed in seeds:
        jobs += [Job(LABELS_ALONE, LABELS_ALONE, seed), Job("kd", "kd", seed)]
        if case == "labels":
            options = {"kd": {"temperature": 2.0, "weight": 1.0, "hard_weight": 0.5}}
            jobs += [Job("kd, weights of dho", "kd", seed, options), Job("dho", "dho", seed)]
        else:
            jobs.append(Job("ofa", "ofa", seed))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=("labels", "black-box"), required=True)
    parser.add_argument("--labelled", type=float, default=0.1, help="share of the images that have a label")
    add_options(parser, epochs=8, processes=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    lesson = course(arguments)
    right = lesson.teacher_accuracy()
    student = lesson.untrained(0)
    macs, parameters = count_macs(student, lesson.spec.input_shape), count_parameters(student)
    plan = choose_plan(student, lesson.spec, lesson.recipe.batch_size, arguments.form)
    labelled = int((lesson.labels >= 0).sum())
    print(
        f"teacher: {100 * right:.2f} % in {lesson.teacher.runtime}; {labelled} of {len(lesson.labels)} "
        f"images have a label; student: {parameters} parameters, {macs / 1e6:.2f} MMACs; {plan}",
        flush=True,
    )
    jobs = jobs_of(arguments.case, arguments.seeds)
    results = train_in_processes(lesson, course, arguments, jobs, plan)
    names = list(dict.fromkeys(job.name for job in jobs))
    print(table(sorted(results, key=lambda r: names.index(r.name)), names[1:-1]))
    facts = {
        "case": arguments.case,
        "teacher_accuracy": right,
        "plan": str(plan),
        "labelled": labelled,
    }
    write_summary(arguments.out, facts, lesson, results, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
