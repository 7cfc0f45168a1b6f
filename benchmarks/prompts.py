"""The prompts of the cost benchmarks: ARC-Easy by letters, or the headlines of the demo."""

import string
from dataclasses import replace

import pyrolora as pl
from pyrolora.models.tasks import Task
from pyrolora.models.tasks.formats import Letter


def multiple_choice(data_dir: str | None, classes: int = 5) -> Task:
    """ARC-Easy asked by letters, those after D as labels that are never right; the headlines without a folder."""
    if data_dir is None:
        return pl.task("bbc_headlines", train_size=300)
    task = pl.task("arc_easy", data_dir=data_dir, train_size=300)
    letters = tuple(string.ascii_uppercase[:classes])
    splits = {name: replace(getattr(task, name), classes=classes) for name in ("train", "validation", "test")}
    return replace(task, labels=letters, format=Letter(letters=letters), **splits)


def released_prompts(data_dir: str | None) -> Task:
    """ARC-Easy as the released BLoB code asks it; the headlines without a folder."""
    if data_dir is None:
        return multiple_choice(None)
    return pl.task("arc_easy_paper", data_dir=data_dir, train_size=300)
