"""The report that `evaluate` returns: rows to compute with, a table to read, files to keep."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from pyrolora.inference.evaluation.aggregate import Row, Summary, summarise
from pyrolora.inference.evaluation.bootstrap import Interval
from pyrolora.inference.evaluation.calibration import CalibrationTable
from pyrolora.inference.evaluation.cost import Cost
from pyrolora.inference.evaluation.markdown import Column, render_markdown
from pyrolora.inference.evaluation.plots import reliability_diagram
from pyrolora.inference.evaluation.selective import RiskCoverage
from pyrolora.models.atomic import replacing

FORMAT = 2


@dataclass(frozen=True)
class Report:
    """Judgement of several methods on the same test items.

    ``report = evaluate({"mle": mle, "blob": blob}, task.test); report.save("runs/demo")``

    Attributes:
        rows: one a method and seed.
        columns: the metrics, in the order of the table.
        n_bins: bins of the calibration errors and tables.
        resamples: bootstrap resamples behind every interval of a row.
        level: probability that the intervals are to cover.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    n_bins: int
    resamples: int
    level: float = 0.95

    @classmethod
    def merge(cls, reports: Iterable["Report"]) -> "Report":
        """Join the reports of several seeds, or of several methods, into one.

        ``Report.merge(evaluate(fit(seed), task.test, seed=seed) for seed in (0, 1, 2))``

        Args:
            reports: reports with the same columns, bins, resamples and level.

        Raises:
            ValueError: no reports, settings that differ, or the same method under the same seed twice.
        """
        given = list(reports)
        if not given:
            raise ValueError("reports: got none, expected at least one. Call evaluate for each seed first.")
        first = given[0]
        for position, other in enumerate(given[1:], start=1):
            for setting in ("columns", "n_bins", "resamples", "level"):
                mine, theirs = getattr(first, setting), getattr(other, setting)
                if mine != theirs:
                    if setting == "columns":
                        mine, theirs = ([column.name for column in columns] for columns in (mine, theirs))
                    raise ValueError(
                        f"reports: report {position} has {setting} {theirs!r}, expected {mine!r} as in the "
                        "first. Evaluate all seeds with the same settings and the same foreign data sets."
                    )
        rows = tuple(row for report in given for row in report.rows)
        seen: set[tuple[str, int]] = set()
        for row in rows:
            if (row.method, row.seed) in seen:
                raise ValueError(
                    f"reports: got method {row.method!r} under seed {row.seed} twice, expected each pair "
                    "once. Pass seed= to evaluate, or give the methods different names."
                )
            seen.add((row.method, row.seed))
        return cls(rows, first.columns, first.n_bins, first.resamples, first.level)

    def summaries(self) -> list[Summary]:
        """Return one line a method, aggregated over its seeds, in the order of the rows."""
        return summarise(self.rows, self.level)

    def to_markdown(self) -> str:
        """Return the table, aligned for a terminal, with a caption that says what its intervals are."""
        return render_markdown(self.summaries(), self.columns, self.n_bins, self.resamples, self.level)

    _repr_markdown_ = to_markdown  # a notebook shows the table

    def reliability_diagram(self, strategy: str = "width") -> tuple[Figure, NDArray[Any]]:
        """Draw accuracy against confidence, one panel a method; see `pyrolora.inference.evaluation.plots`."""
        return reliability_diagram(self, strategy=strategy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN becomes None."""
        return {
            "format": FORMAT,
            "n_bins": self.n_bins,
            "resamples": self.resamples,
            "level": self.level,
            "columns": [asdict(column) for column in self.columns],
            "rows": [_row_to_dict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Report":
        """Read what `to_dict` returned.

        Raises:
            ValueError: another format, or a key that is missing.
        """
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"report: got format {saved.get('format')!r}, expected {FORMAT}. "
                "Evaluate again with this version of pyrolora, or read it with the one that wrote it."
            )
        try:
            return cls(
                rows=tuple(_row_from_dict(row) for row in saved["rows"]),
                columns=tuple(Column(**column) for column in saved["columns"]),
                n_bins=saved["n_bins"],
                resamples=saved["resamples"],
                level=saved["level"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"report: the saved data is incomplete ({error}); expected what to_dict returns."
            ) from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``report.md``, ``report.json`` and ``reliability.png``; each appears complete or not at all.

        ``report.save("runs/demo")``

        Args:
            folder: made if it is not there.

        Returns:
            The folder.
        """
        figure, _ = self.reliability_diagram()
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        contents = {
            "reliability.png": picture.getvalue(),
            "report.md": self.to_markdown().encode(),
            # last, because its presence means that the folder is complete
            "report.json": json.dumps(self.to_dict(), indent=1, allow_nan=False).encode(),
        }
        target = Path(folder)
        for name, content in contents.items():
            with replacing(target / name) as partial:
                partial.write_bytes(content)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Report":
        """Read a report that `save` wrote.

        ``Report.load("runs/demo").to_markdown()``

        Args:
            folder: what was given to `save`.

        Raises:
            FileNotFoundError: no ``report.json`` in the folder.
            ValueError: a file that is truncated or of another format.
        """
        path = Path(folder) / "report.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"folder: found no report.json in {str(folder)!r}, expected a folder that Report.save wrote."
            )
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}: not a complete JSON file ({error}). Evaluate again, or restore the file."
            ) from error
        if not isinstance(saved, dict):
            raise ValueError(f"{path}: got a JSON {type(saved).__name__}, expected the object that Report.save writes.")
        return cls.from_dict(saved)


def _row_to_dict(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "seed": row.seed,
        "kind": row.kind,
        "draws": row.draws,
        "examples": row.examples,
        "metrics": {name: interval.to_dict() for name, interval in row.metrics.items()},
        "calibration": {name: table.to_dict() for name, table in row.calibration.items()},
        "risk_coverage": row.risk_coverage.to_dict(),
        "predict_seconds": row.predict_seconds,
        "ood_examples": dict(row.ood_examples),
        "shift_examples": dict(row.shift_examples),
        "cost": None if row.cost is None else row.cost.to_dict(),
    }


def _row_from_dict(saved: Mapping[str, Any]) -> Row:
    copied = ("method", "seed", "kind", "draws", "examples", "predict_seconds", "ood_examples", "shift_examples")
    plain = {name: saved[name] for name in copied}
    return Row(
        **plain,
        metrics={name: Interval.from_dict(interval) for name, interval in saved["metrics"].items()},
        calibration={name: CalibrationTable.from_dict(table) for name, table in saved["calibration"].items()},
        risk_coverage=RiskCoverage.from_dict(saved["risk_coverage"]),
        cost=None if saved["cost"] is None else Cost.from_dict(saved["cost"]),
    )
