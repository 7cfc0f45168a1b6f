"""Projected gradient ascent on pixels, at one resolution or at several at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers

STARTS = ("uniform", "normal", "zero")
# resolution of each level and what multiplies it
Levels: TypeAlias = list[tuple[tuple[int, int], float]]
# standard deviation of a normal start, in units of the pixel range
NORMAL_START = 1e-3


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent in the box ``|x' - x| <= epsilon`` around images in [0, 1].

    Usage::

        attack = PGD(epsilon=8 / 255, steps=10, step_size=0.8 / 255)
        attacked = attack(images, cross_entropy_objective(predict, labels), generator)

    Each step moves every pixel by ``step_size`` along the sign of the gradient and projects it to the box and the pixel
    range; no parameter collects a gradient. Gradients pass the edges of the range as if they were not there: cut off, they
    would never bring back a black pixel that a random start made blacker.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, section 2.1.

    Args:
        epsilon: half-width of the box, in units of the pixel range [0, 1]; 0 returns the images.
        steps: gradient steps.
        step_size: length of a step in the same units; None for ``epsilon / 2``.
        start: ``"uniform"`` in the box, ``"normal"`` with standard deviation 0.001 (cut to the box), or ``"zero"``. From zero
            an objective whose gradient vanishes at the clean images follows the signs of round-off.

    Raises:
        ValueError: a setting out of range.
    """

    epsilon: float = field(metadata={"help": "half-width of the box, pixels in [0, 1]"})
    steps: int = field(default=2, metadata={"help": "gradient steps"})
    step_size: float | None = field(default=None, metadata={"help": "length of a step; None for epsilon / 2"})
    start: str = field(default="uniform", metadata={"help": "'uniform', 'normal' or 'zero'"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.epsilon <= 1:
            raise ValueError(
                f"epsilon is a distance in units of the pixel range, in [0, 1]; got {self.epsilon}. "
                "8 grey levels of 255 are 8 / 255 = 0.031."
            )
        if self.steps < 1:
            raise ValueError(f"An attack takes at least 1 step; got {self.steps}. 2 in training, 10 in evaluation.")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, or None for epsilon / 2; got {self.step_size}.")
        if self.start not in STARTS:
            raise ValueError(
                f"Unknown start {self.start!r}. Did you mean {nearest(self.start, STARTS)!r}? Starts: {', '.join(STARTS)}."
            )

    def levels(self, images: Tensor) -> Levels:
        """Resolutions of the perturbation and what multiplies each; here the images' own, once."""
        return [((images.shape[-2], images.shape[-1]), 1.0)]

    def reach(self, images: Tensor) -> float:
        """The most that a pixel can move, which more than one level makes larger than ``epsilon``."""
        return self.epsilon * sum(multiplier for _, multiplier in self.levels(images))

    def __call__(
        self, images: Tensor, objective: Callable[[Tensor], Tensor], generator: torch.Generator | None = None
    ) -> Tensor:
        """Attacked images, detached.

        Args:
            images: clean images, every entry in [0, 1].
            objective: from images to one number that is to become large.
            generator: seeds the start; a CPU generator serves any device.

        Shape:
            ``(..., channels, height, width)``, in and out

        Raises:
            ValueError: images outside [0, 1] or without the three last dimensions.
        """
        check_images(images)
        levels = self.levels(images)
        if self.epsilon == 0:
            return images.detach().clone()
        deltas = self._in_range(images, [self._start(images, size, generator) for size, _ in levels], levels)
        step = self.epsilon / 2 if self.step_size is None else self.step_size
        for _ in range(self.steps):
            leaves = [delta.requires_grad_() for delta in deltas]
            with torch.enable_grad():
                value = objective(self._moved(images, leaves, levels))
            gradients = torch.autograd.grad(value, leaves)
            deltas = [
                (delta.detach() + step * gradient.sign()).clamp(-self.epsilon, self.epsilon)
                for delta, gradient in zip(leaves, gradients, strict=True)
            ]
            deltas = self._in_range(images, deltas, levels)
        return self._moved(images, deltas, levels).detach()

    def _start(self, images: Tensor, size: tuple[int, int], generator: torch.Generator | None) -> Tensor:
        shape = (*images.shape[:-2], *size)
        if self.start == "zero":
            return torch.zeros(shape, dtype=images.dtype, device=images.device)
        device = "cpu" if generator is None else generator.device
        if self.start == "normal":
            start = NORMAL_START * torch.randn(shape, generator=generator, device=device)
        else:
            start = self.epsilon * (2 * torch.rand(shape, generator=generator, device=device) - 1)
        return start.clamp(-self.epsilon, self.epsilon).to(images)

    def _in_range(self, images: Tensor, deltas: list[Tensor], levels: Levels) -> list[Tensor]:
        """The pixels' own level, last, cut to where it has an effect."""
        below = self._moved(images, deltas[:-1], levels[:-1])
        return [*deltas[:-1], (below + deltas[-1]).clamp(0, 1) - below]

    def _moved(self, images: Tensor, deltas: list[Tensor], levels: Levels) -> Tensor:
        """Images plus every level's blocks, cut to the pixel range after each."""
        moved, size = images, (images.shape[-2], images.shape[-1])
        for delta, (level, multiplier) in zip(deltas, levels, strict=True):
            blocks = delta
            if level != size:
                blocks = functional.interpolate(delta.flatten(0, -4), size=size, mode="nearest").view_as(images)
            moved = _cut(moved + multiplier * blocks)
        return moved


class _Cut(torch.autograd.Function):
    """Cut to [0, 1] with the gradient of the identity."""

    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


def _cut(images: Tensor) -> Tensor:
    cut: Any = _Cut.apply
    return cut(images)


@dataclass(frozen=True)
class PyramidPGD(PGD):
    """`PGD` on coarse blocks, finer blocks and pixels at once, each in a box of its own.

    Usage::

        attacked = PyramidPGD(epsilon=0.1 / 255)(images, objective, generator)

    The image is divided into 4 x 4 and 8 x 8 blocks (fewer where it has fewer pixels); a block of the coarsest level moves by
    up to 20 ``epsilon``, of the next by 10, a pixel by 1, so the whole move may reach 31 ``epsilon``.

    Source: the released code of AMT, 2024, after Herrmann et al., "Pyramid Adversarial Training", 2022.

    Args:
        epsilon: half-width of every level's box before its multiplier.
        blocks: blocks along each side at the coarser levels.
        multipliers: what multiplies each coarser level; the pixels' own is 1.

    Raises:
        ValueError: a setting out of range, or not one multiplier for each coarser level.
    """

    blocks: tuple[int, ...] = field(default=(4, 8), metadata={"help": "blocks along a side at the coarser levels"})
    multipliers: tuple[float, ...] = field(default=(20.0, 10.0), metadata={"help": "multiplier of each coarser level"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.blocks) != len(self.multipliers):
            raise ValueError(
                f"{len(self.blocks)} coarser levels and {len(self.multipliers)} multipliers were given; give one each, such "
                "as blocks=(4, 8), multipliers=(20, 10)."
            )
        whole = all(isinstance(blocks, Integral) and blocks >= 1 for blocks in self.blocks)
        if not whole or not all(0 < multiplier < math.inf for multiplier in self.multipliers):
            raise ValueError(
                f"Blocks are whole numbers of at least 1 and multipliers positive; got {self.blocks} and {self.multipliers}. "
                "The published ones are (4, 8) and (20, 10)."
            )

    def levels(self, images: Tensor) -> Levels:
        """See `PGD.levels`."""
        height, width = images.shape[-2:]
        coarse = [
            ((min(blocks, height), min(blocks, width)), multiplier)
            for blocks, multiplier in zip(self.blocks, self.multipliers, strict=True)
        ]
        return [*coarse, ((height, width), 1.0)]


def check_images(images: Tensor) -> None:
    """Refuse what is not a float image in [0, 1].

    Raises:
        ValueError: too few dimensions, integers, or an entry outside the range.
    """
    if images.dim() < 3 or not images.is_floating_point():
        raise ValueError(
            f"Images are float tensors (..., channels, height, width); got {images.dtype} of shape {tuple(images.shape)}. "
            "Divide integers by 255."
        )
    low, high = torch.aminmax(images)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"Pixels must lie in [0, 1]; these lie in [{float(low):.3g}, {float(high):.3g}]. Divide grey levels by 255, and "
            "leave normalisation to the backbone."
        )
