"""A grid of experiments: task x adapter x method x seed, where methods may be spelled out as guide x engine."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from pyrolora.inference.evaluation.configuration import ExperimentConfig
from pyrolora.inference.evaluation.experiment import UnfinishedCellsError, finish_cells, prepare
from pyrolora.inference.evaluation.report import Report
from pyrolora.models.naming import nearest

logger = logging.getLogger(__name__)

# engines that have no guide to vary: one method each, however many guides there are
WITHOUT_GUIDE = {"MAP": "map", "Laplace": "laplace"}


@dataclass(frozen=True)
class Grid:
    """All that an experiment file says.

    Usage::

        grid = Grid.from_dict({"tasks": ["bbc_headlines", "uci_sentiment"], "methods": ["mle", "blob"], "seeds": 3})
        run_grid(grid, "runs/grid")

    Attributes:
        tasks: name -> settings of that task alone (``data_dir``, ``ood``, ``shift``, ``train_size``, ...).
        adapters: declarations of adapters.
        methods: names, as `ExperimentConfig` takes them.
        engines: engines to be crossed with ``guides``.
        guides: declarations of guides to be crossed with ``engines``.
        shared: settings of every experiment, by the names of `ExperimentConfig`.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    adapters: tuple[str, ...] = ("LoRA()",)
    methods: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    guides: tuple[str, ...] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Grid":
        """Read an experiment file's values.

        A single ``task`` or ``adapter`` may stand for the list of one.

        Raises:
            ValueError: an unknown key (the nearest is offered), no task, or no method.
        """
        values = dict(values)
        own = [entry.name for entry in fields(cls) if entry.name != "shared"]
        of_experiment = [entry.name for entry in fields(ExperimentConfig)]
        for key in values:
            if key not in (*own, *of_experiment):
                raise ValueError(
                    f"Unknown setting {key!r}. Did you mean {nearest(key, [*own, *of_experiment])!r}? "
                    f"Settings: {', '.join(dict.fromkeys([*own, *of_experiment]))}."
                )
        for one, many in (("task", "tasks"), ("adapter", "adapters")):
            if one in values and many in values:
                raise ValueError(f"Both {one} and {many} are given; say it once.")
            if one in values:
                values[many] = [values.pop(one)]
        tasks = values.pop("tasks", None)
        if not tasks:
            raise ValueError("No task to run. Give tasks, such as [bbc_headlines].")
        named = {name: {} for name in _listed("tasks", tasks)} if not isinstance(tasks, Mapping) else tasks
        lists = {name: _listed(name, values.pop(name)) for name in own[1:] if name in values}
        grid = cls({name: dict(changes or {}) for name, changes in named.items()}, **lists, shared=values)
        if not grid.methods and not grid.engines:
            raise ValueError("No method to run. Give methods, such as [mle, blob], or engines and guides.")
        return grid

    def experiments(self) -> dict[str, ExperimentConfig]:
        """Folder below the grid's own -> experiment, one for each task and adapter.

        Raises:
            ValueError: whatever an `ExperimentConfig` refuses, or two adapters that would share a folder.
        """
        methods, settings = self._methods()
        found: dict[str, ExperimentConfig] = {}
        for (name, changes), adapter in product(self.tasks.items(), self.adapters):
            folder = f"{name}/{folder_name(adapter)}"
            if folder in found:
                raise ValueError(f"The adapter {adapter!r} is listed twice. Name each once.")
            own = {**self.shared, **changes, "task": name, "adapter": adapter, "methods": methods}
            layers = (settings, self.shared.get("settings") or {}, changes.get("settings") or {})
            own["settings"] = {
                method: {key: value for layer in layers for key, value in layer.get(method, {}).items()}
                for method in dict.fromkeys(name for layer in layers for name in layer)
            }
            found[folder] = ExperimentConfig.from_dict(own)
        return found

    def _methods(self) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
        """Names of all methods, and what defines those that are crossed."""
        names, settings = list(self.methods), {}
        if bool(self.guides) and not self.engines:
            raise ValueError("guides are given without engines. Give engines as well, such as [SVI].")
        for engine in self.engines:
            if engine in WITHOUT_GUIDE:
                names.append(WITHOUT_GUIDE[engine])
                continue
            if not self.guides:
                raise ValueError(
                    f"The engine {engine!r} needs a guide. Give guides, such as ['BLoB()', 'MeanField()']."
                )
            for guide in self.guides:
                name = f"{engine}-{folder_name(guide)}"
                names.append(name)
                settings[name] = {"engine": engine, "guide": guide}
        return tuple(dict.fromkeys(names)), settings


def folder_name(declaration: str) -> str:
    """A declaration as a file system likes it: ``folder_name("LoRA(rank=8)")  # 'LoRA-rank-8'``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", declaration).strip("-")


def run_grid(grid: Grid, out: str | Path, *, progress: bool = True) -> dict[str, Report]:
    """Compute every cell of every experiment that is not finished yet.

    ``run_grid(Grid.from_dict(read_config("grid.yaml")), "runs/grid")``

    A run that was killed goes on where it stopped, and any number of processes may share a folder: each cell is claimed by
    one of them. A cell that fails does not keep the others from being computed.

    Args:
        grid: the experiments.
        out: folder for one folder a task and adapter; `render_folder` makes the page of it.
        progress: show bars.

    Returns:
        Folder below ``out`` -> merged report of its experiment.

    Raises:
        ValueError: an experiment that does not fit, before anything of it is written.
        UnfinishedCellsError: cells failed; the rest is finished, and a rerun tries them again.
    """
    out = Path(out)
    experiments = grid.experiments()
    for config in experiments.values():
        config.needed()
    reports: dict[str, Report] = {}
    failures, backbone, loaded = [], None, None
    for folder, config in experiments.items():
        logger.info("experiment %s", folder)
        key = (config.model, config.dtype, config.device)
        prepared = prepare(config, out / folder, backbone if key == loaded else None, keep_going=True)
        backbone, loaded = prepared.backbone, key
        try:
            reports[folder] = finish_cells(config, out / folder, prepared, progress=progress, keep_going=True)
        except UnfinishedCellsError as error:
            failures.append(f"{folder}: {error}")
    if failures:
        raise UnfinishedCellsError(" ".join(failures))
    return reports


def _listed(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")] if "(" not in value else [value]
    if not isinstance(value, Sequence) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name} is {value!r}; expected a list of names.")
    return tuple(value)
