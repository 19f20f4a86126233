"""Train the demo teacher on the shipped 12,000 Fashion-MNIST images and store it as fp16 safetensors.

    python tools/train_demo_teacher.py --epochs 120 --out calibration/fashion_mnist/teacher.safetensors

Uses a GPU when there is one. Only the training images are used to train; the 3,000 validation images
are looked at once, after the last epoch. Prints one JSON line with the accuracy of the stored file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

MEAN, STD = 0.2860, 0.3530  # of the training pixels, after division by 255


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to two pixels, horizontal flip, and an erased 8x8 patch in half of the images."""
    n = len(x)

    def rand(high: int) -> Tensor:
        return torch.randint(0, high, (n,), generator=generator)

    shift_y, shift_x, flip = rand(5), rand(5), rand(2)
    erase, top, left = rand(2), rand(28), rand(28)
    shift_y, shift_x, flip, erase, top, left = (
        t.to(x.device) for t in (shift_y, shift_x, flip, erase, top, left)
    )
    padded = F.pad(x, (2, 2, 2, 2), value=float(-MEAN / STD))
    index = torch.arange(28, device=x.device)
    columns = torch.where(flip[:, None] == 1, 27 - index, index) + shift_x[:, None]
    rows = index + shift_y[:, None]
    batch = torch.arange(n, device=x.device)[:, None, None]
    out = padded[batch, 0, rows[:, :, None], columns[:, None, :]][:, None]
    inside_y = (index[None] >= top[:, None] - 4) & (index[None] < top[:, None] + 4)
    inside_x = (index[None] >= left[:, None] - 4) & (index[None] < left[:, None] + 4)
    mask = inside_y[:, :, None] & inside_x[:, None, :] & (erase == 1)[:, None, None]
    return out.masked_fill(mask[:, None], float(-MEAN / STD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    from safetensors.torch import load_file, save_file

    from edgekd.demo import DemoTeacher, demo_folder

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with np.load(demo_folder() / "images.npz") as archive:
        arrays = [torch.from_numpy(archive[k]) for k in ("Xt", "Yt", "Xe", "Ye")]
    x, y, x_val, y_val = (a.to(device) for a in arrays)
    x = ((x.float() / 255 - MEAN) / STD)[:, None]
    x_val = ((x_val.float() / 255 - MEAN) / STD)[:, None]
    y, y_val = y.long(), y_val.long()

    model = DemoTeacher().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks this form
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    batch_size = 128
    steps = arguments.epochs * (len(x) // batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.1)
    begin = time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        for step in range(len(x) // batch_size):
            rows = order[step * batch_size : (step + 1) * batch_size].to(device)
            images = augment(x[rows], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), y[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        if epoch % 10 == 9:
            seconds = time.perf_counter() - begin
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)

    state = {k: v.detach().cpu() for k, v in average.module.state_dict().items()}
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, arguments.out)

    stored = DemoTeacher()
    read = load_file(arguments.out)
    stored.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in read.items()})
    stored.eval().to(device)
    with torch.inference_mode():
        logits = torch.cat([stored(part) for part in x_val.split(500)])
        train_logits = torch.cat([stored(part) for part in x.split(500)])
    print(
        json.dumps(
            {
                "validation_accuracy": (logits.argmax(1) == y_val).float().mean().item(),
                "training_accuracy": (train_logits.argmax(1) == y).float().mean().item(),
                "validation_nll": F.cross_entropy(logits, y_val).item(),
                "parameters": sum(p.numel() for p in stored.parameters()),
                "bytes": arguments.out.stat().st_size,
                "epochs": arguments.epochs,
                "seed": arguments.seed,
                "device": str(device),
                "torch": torch.__version__,
                "seconds": time.perf_counter() - begin,
            }
        )
    )


if __name__ == "__main__":
    main()
