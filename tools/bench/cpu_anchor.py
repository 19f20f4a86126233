"""A distillation result that a reader can repeat on two CPU cores: CIFAR-10, seven methods, three seeds.

    OMP_NUM_THREADS=1 python tools/bench/cpu_anchor.py --data DATA --models MODELS --out cpu_anchor.json

DATA holds cifar10_train_a25k_q95.npz, cifar10_test.npz and load_shared.py; MODELS holds
cifar10_resnet20_akamaster.pt, a published ResNet-20. All trainings have the same images (a random subset with
equally many of each class), views, epochs, optimiser and schedule; those of one seed have the same first
weights and order of images. Methods have their default options: nothing is tuned on these images. Accuracy is
that of the last epoch on the test images. Differences to other rows are paired by seed.
"""

from __future__ import annotations

import argparse
import time

import torch
from cifar_resnet import CifarResNet
from cifar_resnet_padded import PaddedResNet
from trainings import (
    LABELS_ALONE,
    Course,
    Job,
    add_options,
    choose_plan,
    read_part,
    table,
    teacher_of,
    train_in_processes,
    write_summary,
)

from edgekd.nets import count_macs, count_parameters
from edgekd.recipe import DistillRecipe
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.tasks.classification import normalise
from edgekd.user_model import TEACHER, load_weights

PREPROCESSING = Preprocessing(32, 32, "rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PUBLISHED_ACCURACY = 0.9173  # of the teacher, on the test images
METHODS = (LABELS_ALONE, "kd", "lskd", "dkd", "dist", "pskd", "ofa")


def course(arguments: argparse.Namespace) -> Course:
    """Subset, teacher and student."""
    images, labels, classes = read_part(arguments.data, ["cifar10_train_a25k_q95.npz"], arguments.images)
    test_images, test_labels, _ = read_part(arguments.data, ["cifar10_test.npz"], arguments.test_images)
    spec = ModelSpec(PREPROCESSING, classes)
    network = PaddedResNet(3)
    load_weights(network, arguments.models / "cifar10_resnet20_akamaster.pt", TEACHER)
    teacher = teacher_of("resnet20", network, spec, normalise(test_images[:256], PREPROCESSING))
    recipe = DistillRecipe(epochs=arguments.epochs, views=arguments.views)
    return Course(
        spec=spec,
        images=images,
        labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        teacher=teacher,
        student=lambda: CifarResNet(arguments.student, len(classes)),
        recipe=recipe,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    add_options(parser, epochs=12, processes=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    lesson = course(arguments)
    right = lesson.teacher_accuracy()
    student = lesson.untrained(0)
    macs, parameters = count_macs(student, lesson.spec.input_shape), count_parameters(student)
    plan = choose_plan(student, lesson.spec, lesson.recipe.batch_size, arguments.form)
    print(
        f"teacher: {100 * right:.2f} % in {lesson.teacher.runtime}; "
        f"published {100 * PUBLISHED_ACCURACY:.2f}; "
        f"{arguments.student}: {parameters} parameters, {macs / 1e6:.2f} MMACs; {plan}",
        flush=True,
    )
    if abs(right - PUBLISHED_ACCURACY) > max(
        0.005, 0.83 / len(lesson.test_labels) ** 0.5
    ):  # 3 standard errors
        raise SystemExit("the teacher is not what it should be: check its weights and the test images")
    jobs = [Job(method, method, seed) for seed in arguments.seeds for method in arguments.methods]
    results = train_in_processes(lesson, course, arguments, jobs, plan)
    print(table(sorted(results, key=lambda r: arguments.methods.index(r.name)), (LABELS_ALONE, "kd")))
    facts = {"teacher_accuracy": right, "student": arguments.student, "plan": str(plan)}
    write_summary(arguments.out, facts, lesson, results, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
