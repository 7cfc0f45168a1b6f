"""The pages of a folder of experiments: what is finished, what is missing, and how the methods differ, read from disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray
import yaml
from torch import Tensor

from pyrolora.inference.evaluation.aggregate import Summary
from pyrolora.inference.evaluation.bootstrap import Interval
from pyrolora.inference.evaluation.cell import LAYERS, Cell
from pyrolora.inference.evaluation.configuration import ExperimentConfig, Loader
from pyrolora.inference.evaluation.experiment import CONFIG
from pyrolora.inference.evaluation.markdown import Column
from pyrolora.inference.evaluation.metrics import classification_metrics
from pyrolora.inference.evaluation.permutation import PermutationTest, paired_permutation_test
from pyrolora.inference.evaluation.report import Report

# what the methods are compared in by pairs
COMPARED = ("accuracy", "nll", "brier", "ece")
PERMUTATIONS = 1999


@dataclass(frozen=True)
class Comparison:
    """One method against the reference, on the seeds that both have.

    Attributes:
        method: its name.
        seeds: number of seeds.
        tests: metric -> difference to the reference and its p-value.
    """

    method: str
    seeds: int
    tests: dict[str, PermutationTest]


@dataclass(frozen=True)
class ExperimentPage:
    """All that a page says of one experiment.

    Attributes:
        name: folder below the one that was asked for, or its own name.
        settings: what was compared: model, task, adapter, sizes.
        report: of the finished cells; None if there is none.
        missing: cells that are not finished, as "method, seed".
        reference: method that the others are compared with.
        comparisons: one a method.
        layers: method -> `layer_summary` of its first finished seed.
    """

    name: str
    settings: dict[str, Any]
    report: Report | None
    missing: tuple[str, ...]
    reference: str | None
    comparisons: tuple[Comparison, ...]
    layers: dict[str, xarray.Dataset]

    @property
    def finished(self) -> Report:
        """The report.

        Raises:
            ValueError: no cell is finished.
        """
        if self.report is None:
            raise ValueError(f"No cell of {self.name!r} is finished. Run `pyrolora experiment` again.")
        return self.report

    def sections(self) -> dict[str, list[Column]]:
        """Columns of each table, by its heading."""
        found: dict[str, list[Column]] = {}
        for column in self.finished.columns:
            found.setdefault(column.section, []).append(column)
        return found


def read_pages(folder: str | Path) -> list[ExperimentPage]:
    """Read every experiment in or below a folder: ``read_pages("runs/grid")``.

    Cells that are being computed, or that a killed run left unfinished, are listed as missing.

    Args:
        folder: what `compare` or `run_grid` wrote.

    Raises:
        FileNotFoundError: no such folder, or no experiment in it.
        ValueError: a damaged report or configuration; the file is named.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"No folder at {str(folder)!r}.")
    found = sorted(path.parent for path in root.rglob(CONFIG) if not _is_cell(path.parent))
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no experiment: there is no {CONFIG} in or below it. Give the --out of "
            "`pyrolora experiment` or `pyrolora compare`."
        )
    return [_read_page(root, path) for path in found]


def _is_cell(folder: Path) -> bool:
    return (folder / "posterior_config.json").is_file()


def _read_page(root: Path, folder: Path) -> ExperimentPage:
    try:
        stored = yaml.load((folder / CONFIG).read_text(), Loader=Loader)
        config = ExperimentConfig.from_dict(stored)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} is damaged or of another version ({error}). Run the experiment again."
        ) from error
    names = dict.fromkeys(("zero-shot", *config.methods))
    cells = [Cell(config, name, seed, folder / name / f"seed-{seed}") for seed in range(config.seeds) for name in names]
    finished = [cell for cell in cells if cell.finished]
    reports = [report for report in (cell.report() for cell in finished) if report is not None]
    report = Report.merge(reports) if reports else None
    reference, comparisons = _compare(finished, report.n_bins if report else 15)
    layers: dict[str, xarray.Dataset] = {}
    for cell in finished:
        if cell.name not in layers and (cell.folder / LAYERS).is_file() and cell.name != "zero-shot":
            layers[cell.name] = xarray.load_dataset(cell.folder / LAYERS, engine="h5netcdf")
    shown = ("model", "task", "adapter", "dtype", "train_size", "draws", "seeds")
    return ExperimentPage(
        name=str(folder.relative_to(root)) if folder != root else folder.resolve().name,
        settings={key: stored.get(key) for key in shown},
        report=report,
        missing=tuple(f"{cell.name}, seed {cell.seed}" for cell in cells if not cell.finished),
        reference=reference,
        comparisons=comparisons,
        layers=layers,
    )


def _compare(cells: Iterable[Cell], n_bins: int) -> tuple[str | None, tuple[Comparison, ...]]:
    """Every method against the first fitted one, seeds averaged, items swapped."""
    kept: dict[str, dict[int, dict[str, Tensor]]] = {}
    for cell in cells:
        kept.setdefault(cell.name, {})[cell.seed] = cell.predictions()
    fitted = [name for name in kept if name != "zero-shot"]
    if not fitted:
        return None, ()
    reference = "mle" if "mle" in fitted else fitted[0]
    comparisons = []
    for name in kept:
        seeds = sorted(kept[name].keys() & kept[reference].keys())
        if name == reference or not seeds:
            continue
        labels = kept[reference][seeds[0]]["labels"]
        first, second = ([kept[which][seed]["mean_probs"] for seed in seeds] for which in (name, reference))
        tests = {
            metric: paired_permutation_test(
                first, second, labels, classification_metrics(n_bins)[metric], permutations=PERMUTATIONS
            )
            for metric in COMPARED
        }
        comparisons.append(Comparison(name, len(seeds), tests))
    return reference, tuple(comparisons)


def cell_text(interval: Interval, column: Column) -> str:
    """A value with its interval as every page prints it: ``0.544 [0.51, 0.58]``."""
    if not interval.defined:
        return "undefined"
    digits = column.interval_digits
    return f"{interval.value:.3f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def best_methods(column: Column, summaries: Iterable[Summary]) -> set[str]:
    """Methods whose printed value is the best of a column; none where neither end is better or all print alike."""
    values = {
        summary.method: round(summary.metrics[column.name].value, 3)
        for summary in summaries
        if summary.metrics[column.name].defined
    }
    if column.higher_is_better is None or len(set(values.values())) < 2:
        return set()
    best = max(values.values()) if column.higher_is_better else min(values.values())
    return {name for name, value in values.items() if value == best}


def p_value_text(test: PermutationTest) -> str:
    """A difference with its p-value: ``-0.061 (p 0.004)``."""
    smallest = 1 / (test.permutations + 1)
    p_value = f"< {2 * smallest:.3f}" if test.p_value <= smallest else f"{test.p_value:.3f}"
    return f"{test.difference:+.3f} (p {p_value})"
