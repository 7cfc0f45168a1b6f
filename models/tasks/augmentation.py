"""Random changes of images that leave their class as it is, on tensors and from a seed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Flips, colours and shifts a copy of every image: ``Augmentation()(images, generator)``.

    With one probability an image is flipped (a coin's toss), its brightness, saturation and contrast change, and it is
    shifted by up to a fraction of its sides, with black coming in; else it stays as it is.

    Source: Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020, section 3.1, as the released
    code of P>M>F and AMT applies it to the support set.

    Args:
        flip: whether left and right may be swapped; not where that makes another class, as with letters.
        colour: whether brightness, saturation and contrast change.
        translation: longest shift, as a fraction of each side.
        probability: of an image to be changed at all.

    Raises:
        ValueError: a fraction or probability out of range.
    """

    flip: bool = field(default=True, metadata={"help": "swap left and right in half of the images"})
    colour: bool = field(default=True, metadata={"help": "change brightness, saturation and contrast"})
    translation: float = field(default=0.125, metadata={"help": "longest shift, as a fraction of a side"})
    probability: float = field(default=0.9, metadata={"help": "of an image to be changed at all"})

    def __post_init__(self) -> None:
        if not 0 <= self.translation < 1:
            raise ValueError(f"translation is a fraction of a side in [0, 1); got {self.translation}. Try 0.125.")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability lies in [0, 1]; got {self.probability}. The published one is 0.9.")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Changed copies.

        Args:
            images: in [0, 1].
            generator: a CPU generator; the images may be elsewhere.

        Shape:
            ``(..., channels, height, width)``, in and out
        """
        rows = images.flatten(0, -4)
        count = len(rows)
        # all of one image's chances at once and on the CPU, so that every device sees the same
        chance = torch.rand(count, 7, generator=generator).to(rows.device, rows.dtype)
        changed = rows
        if self.flip:
            changed = torch.where(_column(chance[:, 1] < 0.5), changed.flip(-1), changed)
        if self.colour:
            changed = changed + (_column(chance[:, 2]) - 0.5)
            grey = changed.mean(-3, keepdim=True)
            changed = grey + (changed - grey) * (2 * _column(chance[:, 3]))
            mean = changed.mean((-3, -2, -1), keepdim=True)
            changed = (mean + (changed - mean) * (_column(chance[:, 4]) + 0.5)).clamp(0, 1)
        changed = self._shifted(changed, chance[:, 5:])
        return torch.where(_column(chance[:, 0] < self.probability), changed, rows).view_as(images)

    def _shifted(self, rows: Tensor, chance: Tensor) -> Tensor:
        for dim, share in zip((-2, -1), chance.unbind(-1), strict=True):
            side = rows.shape[dim]
            most = int(side * self.translation + 0.5)
            if most == 0:
                continue
            shift = ((2 * most + 1) * share).floor().long().clamp(max=2 * most) - most
            source = torch.arange(side, device=rows.device) - shift[:, None]
            seen = (source >= 0) & (source < side)
            shape = [len(rows), 1, 1, 1]
            shape[dim] = side
            index = source.clamp(0, side - 1).view(shape).expand_as(rows)
            rows = rows.gather(dim, index) * seen.view(shape)
        return rows


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
