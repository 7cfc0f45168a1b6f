"""Prompts, labels and splits: one task is one data set with one way to ask the question."""

from pyrolora.models.tasks.batching import EncodedSplit, encode
from pyrolora.models.tasks.example import Example, Row
from pyrolora.models.tasks.formats import Format, Letter, OptionScoring, Verbaliser
from pyrolora.models.tasks.readers import blank_reader, choice_reader, text_reader
from pyrolora.models.tasks.registry import names, register, task
from pyrolora.models.tasks.sources import Files, Hub, Package
from pyrolora.models.tasks.splitting import SplitRule
from pyrolora.models.tasks.task import Split, Task, TaskSpec

__all__ = [
    "EncodedSplit",
    "Example",
    "Files",
    "Format",
    "Hub",
    "Letter",
    "OptionScoring",
    "Package",
    "Row",
    "Split",
    "SplitRule",
    "Task",
    "TaskSpec",
    "Verbaliser",
    "blank_reader",
    "choice_reader",
    "encode",
    "names",
    "register",
    "task",
    "text_reader",
]
