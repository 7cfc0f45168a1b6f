"""A frozen vision transformer behind the same face as a language model."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrolora.models.backbones import Backbone
from pyrolora.models.tasks import (
    EncodedImages,
    EpisodeClasses,
    Format,
    ImageClasses,
    Split,
    encode_episodes,
    encode_images,
)

# how far an attack's rounding may leave the range of a pixel
ROUNDING = 1e-5


class VisionBackbone(Backbone):
    """A frozen vision transformer with a class token.

    Usage::

        backbone = load_backbone("dinov2-small@126")
        features = backbone.features({"pixel_values": images})      # (rows, hidden), images in [0, 1]

    Pixels come in [0, 1] and are normalised here, so that whoever changes pixels (an attack, an augmentation) works in units
    of the image, with gradients. Classes of images have no words: their label rows are zeros, which the head's site
    ``head.weight`` is added to.

    Args:
        network: a ``transformers`` vision model without a head (ViT, DeiT, DINOv2); it is set to eval mode and frozen here.
        name: what the user asked for, kept for reports and saved posteriors.
        image_size: height and width in pixels; positions are interpolated where it is not the network's own.
        image_mean: mean of each channel that the network was trained with, in units of [0, 1].
        image_std: standard deviation of each channel, likewise.

    Raises:
        ValueError: a size that is no multiple of the patches, or means and deviations that do not fit the channels.
    """

    formats: ClassVar[tuple[str, ...]] = ("image", "episode")

    def __init__(
        self,
        network: PreTrainedModel,
        name: str,
        *,
        image_size: int | None = None,
        image_mean: Sequence[float] = (0.5,),
        image_std: Sequence[float] = (0.5,),
    ) -> None:
        super().__init__(network, None, name)
        config: Any = network.config
        self.channels, self.patch_size = int(config.num_channels), int(_side(config.patch_size))
        self.image_size = _side(config.image_size) if image_size is None else image_size
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"Images of {self.image_size} pixels do not divide into the patches of {self.patch_size} that {name!r} "
                f"reads. Use {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )
        self._mean, self._std = (self._per_channel(given) for given in (image_mean, image_std))
        if not bool((self._std > 0).all()):
            raise ValueError(
                f"image_std must be positive; got {tuple(image_std)}. ImageNet's are 0.229, 0.224 and 0.225."
            )
        # some interpolate their positions only when they are told to
        self._told = "interpolate_pos_encoding" in inspect.signature(self.body.forward).parameters

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        if len(values) not in (1, self.channels):
            raise ValueError(
                f"{self.name!r} reads {self.channels} channels, and {len(values)} means or deviations were given. Give one "
                "for all, or one for each."
            )
        return torch.tensor(values, dtype=torch.float32, device=self.device).expand(self.channels)[:, None, None]

    @property
    def hidden_size(self) -> int:
        """Width of the features that `features` returns."""
        return self.network.config.hidden_size

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that an image of `image_size` becomes: its patches, the class token and registers."""
        return self.trunk(self._blank(self.image_size), 0).shape[1]

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration, of sampled weights, and of how images are put to the network."""
        put = (self.image_size, self._mean.flatten().tolist(), self._std.flatten().tolist())
        return hashlib.sha256(f"{super().fingerprint}{put}".encode()).hexdigest()[:16]

    def encode(self, split: Split, format: Format, max_length: int) -> EncodedImages:
        """A split of images or of episodes at this network's size; see `pyrolora.models.tasks.encode_images`.

        Raises:
            ValueError: a split or a format of text.
        """
        if isinstance(format, EpisodeClasses):
            return encode_episodes(split, format, channels=self.channels, size=self.image_size, tokens=self.tokens)
        if not isinstance(format, ImageClasses):
            raise ValueError(f"{self.name!r} reads images, and {split.task} is asked as text. Use an image task.")
        return encode_images(split, format, channels=self.channels, size=self.image_size, tokens=self.tokens)

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Ones: no token of an image is padding, ``(rows, tokens)``."""
        images = batch["pixel_values"]
        patches = [images.shape[side] // self.patch_size for side in (-2, -1)]
        beside = self.tokens - (self.image_size // self.patch_size) ** 2
        return torch.ones(images.shape[0], patches[0] * patches[1] + beside, dtype=torch.int64, device=images.device)

    def features(self, batch: Mapping[str, Tensor], *, trunk: Tensor | None = None, first_block: int = 0) -> Tensor:
        """Hidden state of the class token after the last norm; the last block runs for it alone, as `Backbone.features` says.

        Args:
            batch: ``pixel_values``, ``(rows, channels, height, width)`` in [0, 1].
            trunk: see `Backbone.hidden_states`.
            first_block: see `Backbone.hidden_states`.

        Shape:
            ``(rows, hidden)``

        Raises:
            ValueError: images of a wrong shape, type or range.
        """
        first = torch.zeros(batch["pixel_values"].shape[0], dtype=torch.int64, device=self.device)
        return self._features_at(first, batch, trunk, first_block)

    def label_weight(self, label_ids: Tensor | None = None) -> Tensor:
        """Zeros: classes of images have no words that the network knew before.

        Shape:
            ``(labels, hidden)``
        """
        labels = 0 if label_ids is None else len(label_ids)
        return torch.zeros(labels, self.hidden_size, dtype=self.dtype, device=self.device)

    def _blank(self, size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, self.channels, size, size)}

    def _traced_input(self) -> dict[str, Any]:
        return self._smallest_input()

    def _smallest_input(self) -> dict[str, Any]:
        return self._inputs(self._blank(self.patch_size))

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        images = batch["pixel_values"]
        self._check(images)
        normal = (images.to(self.device, torch.float32) - self._mean) / self._std
        return {"pixel_values": normal.to(self.dtype), **({"interpolate_pos_encoding": True} if self._told else {})}

    def _check(self, images: Tensor) -> None:
        sides = images.shape[2:]
        whole = images.dim() == 4 and all(side >= self.patch_size and side % self.patch_size == 0 for side in sides)
        if not whole or images.shape[1] != self.channels:
            raise ValueError(
                f"pixel_values have the shape {tuple(images.shape)}; {self.name!r} reads (rows, {self.channels}, height, "
                f"width) with sides that are multiples of {self.patch_size}, usually {self.image_size}. Resize the images, "
                "or encode the split with the model."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"pixel_values are {images.dtype}; expected floating-point numbers in [0, 1]. Divide by 255."
            )
        # on a GPU a look at the range would wait for all work before it
        if images.device.type == "cpu" and images.numel():
            low, high = (float(end) for end in images.detach().aminmax())
            if not (low >= -ROUNDING and high <= 1 + ROUNDING):
                raise ValueError(
                    f"pixel_values run from {low:.4g} to {high:.4g}; expected [0, 1], before any normalisation, which "
                    "happens here. Divide bytes by 255, and clamp what an attack made."
                )


def _side(size: Any) -> int:
    """One side of what a configuration gives as a number or as a pair."""
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise ValueError(f"The network reads images or patches of {height} x {width}, and only squares are supported.")
    return height
