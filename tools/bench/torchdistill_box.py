"""torchdistill's training box (arXiv:2011.12913, https://github.com/yoshitomo-matsubara/torchdistill) as one
contender of a speed benchmark: its own DataLoader, hooks, loss registry and optimiser, from a training
configuration as in its examples, without the meters that those print.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

_KEPT: list[torch.library.Library] = []  # a declaration lasts as long as its library


def import_torchvision() -> str:
    """Import torchvision, which torchdistill needs; returns "" or what had to be done.

    Its wheels on PyPI are built for CUDA, and their compiled operators do not load beside a torch without.
    No operator is used here, so the schemas that its Python code asks for at import are declared. This exists
    for the comparison only.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        importlib.import_module("torchvision")
        return "torchvision without its compiled operators"
    return ""


class TorchDistillBox:
    """Vanilla KD by ``DistillationBox``.

    Raises:
        ImportError: torchdistill or something it needs is not installed.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        data: Dataset[Any],
        batch_size: int,
        optimizer: dict[str, float],
        temperature: float,
    ) -> None:
        """`optimizer`: arguments of AdamW. The loss is 0.1 cross-entropy and 0.9 T^2 KL."""
        import_torchvision()
        distillation = importlib.import_module("torchdistill.core.distillation")
        teacher.eval()
        output = {"module_path": ".", "module_io": "output"}
        paths = {f"{who}_{key}": value for who in ("student", "teacher") for key, value in output.items()}
        loss = {"key": "KDLoss", "kwargs": paths | {"temperature": temperature, "alpha": 0.1}}
        self._box: Any = distillation.get_distillation_box(
            teacher,
            student,
            {"train": data},
            {
                "num_epochs": 1,
                "train_data_loader": {
                    "dataset_id": "train",
                    "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
                    "kwargs": {"batch_size": batch_size, "num_workers": 0, "drop_last": True},
                },
                "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
                "student": {"requires_grad": True, "forward_proc": "forward_batch_only"},
                "optimizer": {"key": "AdamW", "kwargs": dict(optimizer)},
                "criterion": {
                    "key": "WeightedSumLoss",
                    "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
                },
            },
            torch.device("cpu"),
            None,
            False,
            1,
        )
        self._epoch = 0

    def epoch(self) -> float:
        """One pass over the data; CPU-seconds."""
        begin = time.process_time()
        self._box.pre_epoch_process(epoch=self._epoch)
        for inputs, labels, supplement in self._box.train_data_loader:
            loss = self._box.forward_process(inputs, labels, supplement)
            self._box.post_forward_process(loss=loss)
        self._box.post_epoch_process()
        self._epoch += 1
        return time.process_time() - begin
