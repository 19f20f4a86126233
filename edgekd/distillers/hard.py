"""Hard augmentations: inspired by HARD, of which only the abstract was at hand. Images are moved to where the
student and the teacher disagree, and then used for distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, NonNegative, Positive, Whole
from edgekd.nets import Batch, Outputs, wide


def disagreement(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 mean_n KL(softmax(teacher / T) || softmax(student / T))``, differentiable in both."""
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits) / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def moved(images: Tensor, affine: Tensor, pixels: Tensor) -> Tensor:
    """Images (N, C, H, W) sampled at ``(I + affine) position``, affine (N, 2, 3); then `pixels` are added."""
    unit = torch.eye(2, 3, dtype=images.dtype, device=images.device)
    grid = F.affine_grid(unit + affine, list(images.shape), align_corners=False)
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return sampled + pixels


def _unit(gradient: Tensor) -> Tensor:
    """Each sample's gradient over its root mean square."""
    size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
    return gradient / size.view(-1, *[1] * (gradient.dim() - 1))


class Hard(Distiller):
    """Two ascent steps on ``D(S(Ax), T(Ax)) - prior_weight mean(offsets^2) - teacher_weight D(T(Ax), T(x))``
    in the offsets of A: an affine map and an addition to every pixel, free for each image. Then x and Ax are
    learned from with D as the term, and with any other method joined by ``+``.

    D is KD with T 4. The last two parts keep Ax near x and of one kind for the teacher. No step is taken from
    the moment D exceeds `ceiling` until it falls below `floor`. Steps are `step_size` in units of the offsets
    (a half image, a standard deviation of normalised pixels). T is that of KD; all other values are ours.
    Each ascent step costs a forward and backward pass through both networks, and the batch doubles.
    """

    needs = Needs(input_gradient=True)
    weight = 0.9
    hard_weight = 0.1
    climbing: Tensor

    def __init__(
        self,
        temperature: Positive = 4.0,
        ascent_steps: Whole = 2,
        step_size: Positive = 0.05,
        prior_weight: NonNegative = 1.0,
        teacher_weight: NonNegative = 0.5,
        ceiling: NonNegative = 8.0,
        floor: NonNegative = 4.0,
    ) -> None:
        super().__init__()
        self.temperature, self.ascent_steps, self.step_size = temperature, ascent_steps, step_size
        self.prior_weight, self.teacher_weight = prior_weight, teacher_weight
        self.ceiling, self.floor = ceiling, floor
        self.register_buffer("climbing", torch.ones(()))

    def augment(self, batch: Batch, student: nn.Module, teacher: nn.Module | None, context: Context) -> Batch:
        assert teacher is not None  # `needs` refuses a black box
        images = batch.inputs
        with torch.no_grad():
            plain = teacher(images).logits
            before = [buffer.clone() for buffer in student.buffers()]
        offsets = self._start(images, context.generator)
        for _ in range(self.ascent_steps):
            offsets = self._ascend(images, offsets, plain, lambda x: (student(x).logits, teacher(x).logits))
        with torch.no_grad():
            for buffer, value in zip(student.buffers(), before, strict=True):
                buffer.copy_(value)  # statistics of batch norm are of the images that are learned from
            hard = torch.empty_like(images).copy_(moved(images, *offsets))
        return Batch(torch.cat([images, hard]), batch.labels.repeat(2), batch.index.repeat(2))

    def _start(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Small random offsets: at none, an image of one colour and one that is sampled at its own pixels
        have no direction."""
        affine = torch.randn(len(images), 2, 3, generator=generator, device=images.device, dtype=images.dtype)
        scale = 0.1 * self.step_size * self.climbing.to(images.dtype)
        return scale * affine, torch.zeros_like(images)

    def _ascend(
        self,
        images: Tensor,
        offsets: tuple[Tensor, Tensor],
        plain: Tensor,
        networks: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        affine, pixels = (offset.detach().requires_grad_() for offset in offsets)
        with torch.enable_grad():
            ours, theirs = networks(moved(images, affine, pixels))
            apart = disagreement(ours, theirs, self.temperature)
            prior = affine.square().mean() + pixels.square().mean()
            kept = disagreement(theirs, plain, self.temperature)
            gain = apart - self.prior_weight * prior - self.teacher_weight * kept
        gradients = torch.autograd.grad(gain, (affine, pixels))
        now = apart.detach().to(self.climbing.dtype)
        kept_on = torch.where(now > self.ceiling, 0.0, torch.where(now < self.floor, 1.0, self.climbing))
        self.climbing.copy_(kept_on)
        step = self.step_size * self.climbing.to(images.dtype)
        moves = [step * _unit(gradient) for gradient in gradients]
        return (affine + moves[0]).detach(), (pixels + moves[1]).detach()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return disagreement(student.logits, wide(teacher.logits).detach(), self.temperature)
