"""Prompts, labels and splits: one task is one data set with one way to ask the question."""

from pyrolora.models.tasks.augmentation import Augmentation
from pyrolora.models.tasks.batching import EncodedSplit, encode, independent_rows, row_count
from pyrolora.models.tasks.episodes import (
    EncodedEpisodes,
    EpisodeClasses,
    EpisodeSplit,
    SupportEpisodes,
    encode_episodes,
    episodic,
    support_of,
)
from pyrolora.models.tasks.example import Example, Row
from pyrolora.models.tasks.formats import Format, Letter, OptionScoring, Verbaliser
from pyrolora.models.tasks.image_sources import Folders, ImageHub, Omniglot, PixelTable
from pyrolora.models.tasks.image_tasks import ImageTaskSpec, joined
from pyrolora.models.tasks.images import EncodedImages, ImageClasses, ImageExample, encode_images
from pyrolora.models.tasks.readers import blank_reader, choice_reader, text_reader
from pyrolora.models.tasks.registry import names, register, task
from pyrolora.models.tasks.sources import Files, Hub, Package
from pyrolora.models.tasks.splitting import SplitRule
from pyrolora.models.tasks.task import Split, Task, TaskSpec

__all__ = [
    "Augmentation",
    "EncodedEpisodes",
    "EncodedImages",
    "EncodedSplit",
    "EpisodeClasses",
    "EpisodeSplit",
    "Example",
    "Files",
    "Folders",
    "Format",
    "Hub",
    "ImageClasses",
    "ImageExample",
    "ImageHub",
    "ImageTaskSpec",
    "Letter",
    "Omniglot",
    "OptionScoring",
    "Package",
    "PixelTable",
    "Row",
    "Split",
    "SplitRule",
    "SupportEpisodes",
    "Task",
    "TaskSpec",
    "Verbaliser",
    "blank_reader",
    "choice_reader",
    "encode",
    "encode_episodes",
    "encode_images",
    "episodic",
    "independent_rows",
    "joined",
    "names",
    "register",
    "row_count",
    "support_of",
    "task",
    "text_reader",
]
