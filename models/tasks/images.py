"""Images as examples: pixels that are read when they are needed, and splits of them at one size."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.tasks.batching import EncodedSplit, stacked_vectors
from pyrolora.models.tasks.example import Example
from pyrolora.models.tasks.prompts import EncodedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyrolora.models.tasks.task import Split

# bytes of decoded images that one split keeps; the others are read again for each batch
KEPT_BYTES = 2**30
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601

Pixels = Callable[[], np.ndarray]


@dataclass(frozen=True)
class ImageExample(Example):
    """One image with its class.

    Usage: ``ImageExample.of(lambda: array, digest_of(array.tobytes()), label=3)``.

    The field ``image`` is a digest of the pixels or of the file, by which duplicates are found and splits are made.

    Args:
        pixels: returns the image, uint8, ``(height, width)`` or ``(height, width, 3)``.
    """

    pixels: Pixels = field(default=lambda: np.zeros((1, 1), np.uint8), compare=False, repr=False)

    @classmethod
    def of(cls, pixels: Pixels, digest: str, label: int, id: str = "") -> ImageExample:
        """An example of pixels, their digest and their class."""
        return cls({"image": digest}, label, id=id, pixels=pixels)

    @classmethod
    def from_array(cls, image: np.ndarray, label: int, id: str = "") -> ImageExample:
        """An example of an image in memory, uint8, ``(height, width)`` or ``(height, width, 3)``."""
        return cls.of(lambda: image, digest_of(repr(image.shape).encode() + image.tobytes()), label, id)

    @classmethod
    def from_bytes(cls, data: bytes, label: int, id: str = "", *, inverted: bool = False) -> ImageExample:
        """An example of a picture file's bytes, kept as they are and decoded when needed."""
        return cls.of(lambda: decode(data, id, inverted), digest_of(data), label, id)

    @classmethod
    def from_file(cls, path: Path, label: int, id: str = "", *, inverted: bool = False) -> ImageExample:
        """An example of a picture file, read once for its digest and again whenever its pixels are needed."""
        return cls.of(lambda: decode(path.read_bytes(), str(path), inverted), digest_of(path.read_bytes()), label, id)


def digest_of(data: bytes) -> str:
    """A short hash of bytes."""
    return hashlib.sha256(data).hexdigest()[:32]


def decode(data: bytes, name: str, inverted: bool = False) -> np.ndarray:
    """Pixels of a picture file, grey where it has no colours: ``decode(path.read_bytes(), path.name)``.

    Args:
        data: the file's bytes.
        name: for the message.
        inverted: swap black and white.

    Raises:
        ValueError: no picture that can be read.
    """
    from PIL import Image, UnidentifiedImageError  # imported here: tasks of text need no pictures

    try:
        with Image.open(io.BytesIO(data)) as picture:
            grey = picture.mode in ("1", "L", "I", "I;16", "F", "LA")
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name} is no picture that can be read ({error}). Take it out, or save it as PNG.") from error
    return 255 - pixels if inverted else pixels


@dataclass(frozen=True)
class ImageClasses:
    """Images that belong to one class each; nothing is asked, and the classes have no words.

    Usage: ``ImageClasses(("cat", "dog"))``, or over several tasks in one label space ``ImageClasses(labels, (("digits", 10),
    ("mnist", 10)))``.

    Args:
        labels: names of the classes.
        groups: name and number of classes of every task that the classes come from, in their order; empty for one task.

    Raises:
        ValueError: groups that do not add up to the classes.
    """

    kind: ClassVar[Literal["image"]] = "image"
    fields: ClassVar[tuple[str, ...]] = ("image",)

    labels: tuple[str, ...]
    groups: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.groups and sum(size for _, size in self.groups) != len(self.labels):
            raise ValueError(
                f"The groups {dict(self.groups)} hold {sum(size for _, size in self.groups)} classes, and there are "
                f"{len(self.labels)} labels. Give every class to one group."
            )

    @property
    def group_of_class(self) -> Tensor:
        """Number of the task that each class belongs to, ``(classes,)`` int64."""
        sizes = [size for _, size in self.groups] or [len(self.labels)]
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

    def prompt(self, example: Example) -> str:
        """There is no text before the answer."""
        return ""

    def label_ids(self, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
        """The classes by number: they have no rows in a vocabulary."""
        return tuple(range(len(self.labels)))

    def encode(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int) -> NoReturn:
        """Images become no tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError("These examples are images, which a tokenizer cannot read. Use a vision backbone.")


@dataclass(frozen=True)
class ImageRow(EncodedRow):
    """One image as a network is to see it; its length is the number of the network's tokens.

    Args:
        example: the image.
        channels: of the network.
        size: height and width in pixels.
        tokens: that the network makes of it.
    """

    example: ImageExample = field(default_factory=lambda: ImageExample({}, 0))
    channels: int = 3
    size: int = 224
    tokens: int = 1

    def __len__(self) -> int:
        return self.tokens

    def __repr__(self) -> str:
        # what digests of data are made of
        return f"ImageRow({self.example.fields.get('image')}, {self.channels}x{self.size}x{self.size})"

    def read(self) -> Tensor:
        """The image at its size, ``(channels, size, size)`` uint8.

        Raises:
            ValueError: pixels that are no image of bytes.
        """
        pixels = self.example.pixels()
        if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
            raise ValueError(
                f"The image {self.example.id!r} has the shape {pixels.shape} and the type {pixels.dtype}; expected uint8, "
                "(height, width) or (height, width, 3)."
            )
        image = torch.tensor(pixels, dtype=torch.float32)
        image = image[None] if image.dim() == 2 else image.permute(2, 0, 1)
        if self.channels == 1 and len(image) == 3:
            image = torch.einsum("chw,c->hw", image, torch.tensor(LUMINANCE))[None]
        image = _cropped(image, self.size)
        return image.round().clamp(0, 255).to(torch.uint8).expand(self.channels, -1, -1)


def _cropped(image: Tensor, size: int) -> Tensor:
    """The middle square, its shorter side brought to a size."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    factor = size / min(height, width)
    shape = (max(size, round(height * factor)), max(size, round(width * factor)))
    scaled = functional.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return scaled[:, top : top + size, left : left + size]


@dataclass(frozen=True, eq=False)
class EncodedImages(EncodedSplit):
    """A split of images at a network's size.

    A batch holds ``pixel_values``, ``(B, channels, size, size)`` float32 in [0, 1], ``labels`` and ``index``, ``(B,)``
    int64, and a tensor ``(B, width)`` for each of `vectors`. Decoded images are kept up to `KEPT_BYTES`.
    """

    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def batch(self, positions: list[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """See `EncodedSplit.batch`."""
        images = torch.stack([self._image(position) for position in positions])
        tensors = {
            "pixel_values": images.to(device).float() / 255,
            "labels": self.labels[positions],
            "index": torch.tensor(positions, dtype=torch.int64),
            **{name: values[positions] for name, values in self.vectors.items()},
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def _image(self, position: int) -> Tensor:
        if position in self._kept:
            return self._kept[position]
        row = self.rows[position]
        assert isinstance(row, ImageRow)  # encode_images makes no others
        image = row.read()
        if (len(self._kept) + 1) * image.numel() <= KEPT_BYTES:
            self._kept[position] = image
        return image


def encode_images(split: Split, format: ImageClasses, *, channels: int, size: int, tokens: int) -> EncodedImages:
    """Put a split of images to a network's size: ``encode_images(split, task.format, channels=3, size=224, tokens=257)``.

    Args:
        split: of images, of this task or of another one.
        format: the classes.
        channels: 1 for grey, 3 for colours; a grey image is repeated, a coloured one becomes its luminance.
        size: height and width in pixels; the shorter side is scaled to it and the middle square taken.
        tokens: that the network makes of an image.

    Raises:
        ValueError: a split of texts, or vectors that some images lack.
    """
    for example in split.examples:
        if not isinstance(example, ImageExample):
            raise ValueError(
                f"{split.task} {split.name} holds texts ({', '.join(example.fields)}), and this model reads images. Give a "
                "split of an image task."
            )
    rows = tuple(
        ImageRow([], [], [], [], [], example=example, channels=channels, size=size, tokens=tokens)
        for example in split.examples
        if isinstance(example, ImageExample)
    )
    return EncodedImages(
        name=f"{split.task} {split.name}",
        kind="image",
        rows=rows,
        labels=torch.tensor([example.label for example in split.examples], dtype=torch.int64),
        classes=len(format.labels),
        label_ids=format.label_ids(None),
        pad_id=0,
        padding="right",
        vectors=stacked_vectors(split),
    )
