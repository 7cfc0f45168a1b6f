"""Comparisons from a resolved configuration: every method and seed fitted, kept, judged, and never repeated."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from pyrolora.inference.evaluation.cell import Cell, JudgedOn
from pyrolora.inference.evaluation.configuration import ExperimentConfig, Loader, read_config
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.storage import CONFIG as POSTERIOR
from pyrolora.inference.storage import check_place
from pyrolora.inference.storage import read_config as read_posterior_config
from pyrolora.models.atomic import replacing
from pyrolora.models.backbones import Backbone
from pyrolora.models.loading import load_backbone
from pyrolora.models.tasks import Split, Task, task

__all__ = ["CONFIG", "ExperimentConfig", "compare", "fit_one", "read_config"]

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"

# what a folder may grow by: more methods and seeds are more cells of the same table
GROWING = ("methods", "seeds", "settings")
# seconds between looks at cells that another process is computing
POLL_SECONDS = 0.5


class UnfinishedCellsError(RuntimeError):
    """Some cells failed; the others are finished, and a rerun tries the failed ones again."""


@dataclass(frozen=True)
class Prepared:
    """What all cells of one experiment share."""

    backbone: Backbone
    judged_on: JudgedOn


def compare(config: ExperimentConfig, out: str | Path, *, progress: bool = True) -> Report:
    """Fit and judge every method under every seed; a rerun goes on where the last one stopped.

    Args:
        config: what to compare.
        out: folder for the report, the resolved configuration, and one folder a method and seed.
        progress: show bars.

    Returns:
        The report, also written to ``out``.

    Raises:
        ValueError: the folder holds results of another configuration, or the configuration does not fit; nothing has been
            written then.
    """
    out = Path(out)
    prepared = prepare(config, out)
    return finish_cells(config, out, prepared, progress=progress, keep_going=False)


def fit_one(config: ExperimentConfig, name: str, seed: int, folder: str | Path, *, progress: bool = True) -> Posterior:
    """Fit one method under one seed and keep it in a folder, with the resolved configuration beside it.

    Args:
        config: the experiment; its methods and seeds are not used.
        name: the method.
        seed: the seed.
        folder: where the posterior goes.
        progress: show bars.

    Raises:
        ValueError: the folder holds a posterior of another method, seed or configuration.
    """
    folder = Path(folder).resolve()
    check_place(folder)
    config = dataclasses.replace(config, methods=(name,))
    config.needed()
    if (folder / POSTERIOR).is_file():
        made = read_posterior_config(folder)["record"].get("cell")
        if made != {"method": name, "seed": seed}:
            raise ValueError(
                f"{folder} holds a posterior of {made}, and now method {name!r} under seed {seed} is asked for. Use another "
                "--out, or delete the folder."
            )
        _check_claim(folder, config)
    data = _task(config, seed)
    backbone = load_backbone(config.model, dtype=config.dtype, device=config.device)
    for needed in config.needed():
        if needed in (name, config.method(name).estimate):
            Cell(config, needed, seed, folder).check(backbone, data)
    # beside the posterior, because saving replaces the folder; claimed, so that only the same fit takes it up again
    estimates = folder.with_name(folder.name + ".estimate")
    if config.method(name).estimate is not None:
        _claim(estimates, config)
    posterior = Cell(config, name, seed, folder, estimates).posterior(backbone, data, {}, progress)
    shutil.rmtree(estimates, ignore_errors=True)
    if not (folder / POSTERIOR).is_file():  # the pretrained model is kept nowhere else
        posterior.record["cell"] = {"method": name, "seed": seed}
        posterior.save_pretrained(folder)
    _write_config(folder, config.to_dict())
    return posterior


def prepare(
    config: ExperimentConfig, out: Path, backbone: Backbone | None = None, *, keep_going: bool = False
) -> Prepared:
    """Load what all cells need, refuse what does not fit, and claim the folder; nothing is written before all fits.

    With ``keep_going`` a guide that does not fit its model is left to fail with its cell, as any other failure there.
    """
    needed = config.needed()
    _check_claim(out, config)
    data = _task(config)
    foreign = {name: _at_most(foreign_items(name, data, config.data_dir), config.ood_size) for name in config.ood}
    shifted = {name: _shifted(name, config, data) for name in config.shift}
    test = data.test if config.test_size is None else data.test.subset(config.test_size, seed=0)
    if config.miscoverage is not None and not len(data.validation):
        raise ValueError(
            f"The task {config.task!r} has no validation data to calibrate sets on. Leave miscoverage out."
        )
    backbone = backbone or load_backbone(config.model, dtype=config.dtype, device=config.device)
    for name in needed:
        cell = Cell(config, name, 0, out)
        if keep_going:
            cell.model(backbone, data)  # refuses sites, ranks and priors that do not fit
        else:
            cell.check(backbone, data)
    _claim(out, config)
    return Prepared(backbone, JudgedOn(test, foreign, shifted))


def finish_cells(
    config: ExperimentConfig, out: Path, prepared: Prepared, *, progress: bool, keep_going: bool
) -> Report:
    """Compute every cell that is not finished, beside any number of processes that do the same, and merge the reports.

    A cell that another process holds is passed over; when nothing else is left it is waited for, and taken over if its holder
    dies.
    """
    names = ("zero-shot", *(entry for entry in config.methods if entry != "zero-shot"))
    cells = [Cell(config, name, seed, out / name / f"seed-{seed}") for seed in range(config.seeds) for name in names]
    pending, failures = [cell for cell in cells if not cell.finished], {}
    data: dict[int, Task] = {}
    fitted: dict[int, dict[str, Posterior]] = {}
    while pending:
        before = len(pending)
        for cell in list(pending):
            with cell.claim() as claimed:
                if not claimed:
                    continue
                if not cell.finished:
                    logger.info("%s, seed %d", cell.name, cell.seed)
                    if cell.seed not in data:  # one seed's task and posteriors at a time
                        data, fitted = {cell.seed: _task(config, cell.seed)}, {cell.seed: {}}
                    try:
                        cell.compute(
                            prepared.backbone, data[cell.seed], prepared.judged_on, fitted[cell.seed], progress
                        )
                    except Exception as error:
                        if not keep_going:
                            raise
                        logger.error("%s, seed %d failed: %s", cell.name, cell.seed, error)
                        failures[f"{cell.name}, seed {cell.seed}"] = error
                pending.remove(cell)
        if len(pending) == before:
            time.sleep(POLL_SECONDS)
    finished = [report for report in (cell.report() for cell in cells) if report is not None]
    if finished:
        merged = Report.merge(finished)
        merged.save(out)
    if failures:
        listed = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise UnfinishedCellsError(f"{len(failures)} of {len(cells)} cells failed and the rest is finished. {listed}")
    return merged


def _task(config: ExperimentConfig, seed: int = 0) -> Task:
    return task(config.task, data_dir=config.data_dir, train_size=config.train_size, seed=seed)


def _sibling(name: str, data_dir: str | None) -> Task:
    """Another task: from the same folder if it lies there, else from its package or the hub."""
    if data_dir is not None:
        try:
            return task(name, data_dir=data_dir)
        except FileNotFoundError:
            pass
    return task(name)


def foreign_items(name: str, own: Task, data_dir: str | None) -> Split:
    """Test items of a task whose labels are not used: ``foreign_items("crowd_tweets", own_task, None)``.

    Args:
        name: the foreign task.
        own: the task that posteriors were fitted on.
        data_dir: folder of its files, which may hold the foreign ones too.

    Raises:
        ValueError: they are the task's own test items.
    """
    other = _sibling(name, data_dir).test
    if name != own.name and {row.content for row in other} == {row.content for row in own.test}:
        raise ValueError(
            f"The test items of {name!r} are those of {own.name!r}: both are read from the files in {data_dir!r}. "
            "Give the folder above it, with a folder for each task, as data_dir."
        )
    return other


def _shifted(name: str, config: ExperimentConfig, data: Task) -> Split:
    """Test items of a sibling task."""
    other = _sibling(name, config.data_dir)
    if other.labels != data.labels:
        raise ValueError(
            f"The task {name!r} has the classes {', '.join(other.labels)}, expected {', '.join(data.labels)} as in "
            f"{config.task!r}. Name it under ood, where labels are not used."
        )
    return _at_most(other.test, config.ood_size)


def _at_most(split: Split, size: int) -> Split:
    return split if len(split) <= size else split.subset(size, seed=0)


def _check_claim(out: Path, config: ExperimentConfig) -> dict[str, Any]:
    """What the folder's configuration says, if what the folder holds was made with the same settings.

    Methods and seeds are cells of the same table, so more of them may be added later.
    """
    path = out / CONFIG
    if not path.is_file():
        return {}
    stored = yaml.load(path.read_text(), Loader=Loader)
    resolved = json.loads(json.dumps(config.to_dict()))
    # a folder that is older than a setting was made with what is now its default
    defaults = vars(ExperimentConfig)
    pairs = [(key, stored.get(key, defaults.get(key)), value) for key, value in resolved.items() if key not in GROWING]
    for name, settings in stored["settings"].items():
        asked = resolved["settings"].get(name, settings)
        pairs += [(f"{name}.{key}", settings.get(key), asked.get(key)) for key in {**settings, **asked}]
    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{out} holds results with {key}={before!r}, and now {key}={now!r} is asked for. "
                "Use another --out, or delete the folder."
            )
    return stored


def _claim(out: Path, config: ExperimentConfig) -> None:
    """Write the resolved configuration of everything that the folder holds or will hold."""
    out.mkdir(parents=True, exist_ok=True)
    lock = out / f".{CONFIG}.lock"
    with FileLock(lock):
        stored, resolved = _check_claim(out, config), config.to_dict()
        resolved["methods"] = list(dict.fromkeys([*stored.get("methods", ()), *config.methods]))
        resolved["seeds"] = max(stored.get("seeds", 1), config.seeds)
        resolved["settings"] = {**stored.get("settings", {}), **resolved["settings"]}
        _write_config(out, resolved)
    lock.unlink(missing_ok=True)


def _write_config(out: Path, resolved: Mapping[str, Any]) -> None:
    with replacing(out / CONFIG) as partial:
        partial.write_text(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))
