"""Pages as Markdown, LaTeX and one self-contained HTML file."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from pyrolora.inference.evaluation.curves import layer_maps, risk_coverage_diagram
from pyrolora.inference.evaluation.markdown import caption, cost_rows, undefined_notes
from pyrolora.inference.evaluation.page import (
    COMPARED,
    ExperimentPage,
    best_methods,
    cell_text,
    p_value_text,
    read_pages,
)
from pyrolora.models.atomic import replacing

TEMPLATE = "report.html.jinja"
LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def render_folder(folder: str | Path, out: str | Path | None = None) -> dict[str, Path]:
    """Render every experiment in or below a folder: ``render_folder("runs/grid")["html"]``.

    Args:
        folder: what `compare` or `run_grid` wrote.
        out: where the pages go; the folder itself by default.

    Returns:
        ``"markdown"``, ``"latex"`` and ``"html"`` -> file.

    Raises:
        FileNotFoundError: no such folder, or no experiment in it.
        ValueError: nothing is finished, or a damaged file.
    """
    pages = read_pages(folder)
    if all(page.report is None for page in pages):
        raise ValueError(f"No cell of {str(folder)!r} is finished. Run `pyrolora experiment` again, or wait for it.")
    target = Path(folder) if out is None else Path(out)
    contents = {
        "markdown": ("page.md", to_markdown(pages)),
        "latex": ("page.tex", to_latex(pages)),
        "html": ("page.html", to_html(pages, Path(folder).resolve().name)),
    }
    written = {}
    for kind, (name, text) in contents.items():
        with replacing(target / name) as partial:
            partial.write_text(text, encoding="utf-8")
        written[kind] = target / name
    return written


def to_markdown(pages: Sequence[ExperimentPage]) -> str:
    """All pages as Markdown: the tables of `Report.to_markdown` under a heading each, and the paired comparisons."""
    parts = []
    for page in pages:
        parts.append(f"## {page.name}\n\n{_settings_text(page)}")
        if page.missing:
            parts.append(f"Not finished: {'; '.join(page.missing)}.")
        if page.report is None:
            continue
        parts.append(page.report.to_markdown())
        if page.comparisons:
            rows = [["Method", *_compared_titles(page)], *_comparison_rows(page)]
            lines = ["| " + " | ".join(row) + " |" for row in rows]
            lines.insert(1, "|" + " --- |" * len(rows[0]))
            parts.append(f"### Against {page.reference}\n\n" + "\n".join(lines) + f"\n\n{_comparison_caption(page)}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def to_latex(pages: Sequence[ExperimentPage]) -> str:
    """All pages as LaTeX tables for a document that loads ``booktabs``."""
    parts = ["% needs \\usepackage{booktabs}"]
    for page in pages:
        if page.report is None:
            continue
        summaries = page.report.summaries()
        for section, columns in page.sections().items():
            rows = [[""] + [_latex(column.title) for column in columns]]
            best = {column.name: best_methods(column, summaries) for column in columns}
            for summary in summaries:
                row = [_latex(summary.method)]
                for column in columns:
                    text = cell_text(summary.metrics[column.name], column)
                    value, space, interval = text.partition(" ")
                    value = rf"\textbf{{{value}}}" if summary.method in best[column.name] else value
                    row.append(value + (rf"{space}{{\scriptsize {interval}}}" if interval else ""))
                rows.append(row)
            caption = f"{_latex(page.name)}: {_latex(section)}. {_latex(_settings_text(page))}"
            parts.append(_latex_table(rows, caption))
        if page.comparisons:
            rows = [["", *map(_latex, _compared_titles(page))]]
            rows += [[_latex(entry) for entry in row] for row in _comparison_rows(page)]
            parts.append(_latex_table(rows, f"{_latex(page.name)}: {_latex(_comparison_caption(page))}"))
    return "\n\n".join(parts) + "\n"


def to_html(pages: Sequence[ExperimentPage], title: str) -> str:
    """All pages as one HTML file that needs nothing else: styles and pictures are inside."""
    source = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(title=title, pages=[_html_page(page) for page in pages])


def _html_page(page: ExperimentPage) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": page.name,
        "settings": _settings_text(page),
        "missing": page.missing,
        "tables": [],
        "figures": [],
        "comparison": None,
        "cost": [],
        "notes": [],
    }
    if page.report is None:
        return shown
    summaries = page.report.summaries()
    for section, columns in page.sections().items():
        best = {column.name: best_methods(column, summaries) for column in columns}
        body = []
        for summary in summaries:
            cells = []
            for column in columns:
                value, _, interval = cell_text(summary.metrics[column.name], column).partition(" ")
                note = summary.metrics[column.name].note
                cells.append(
                    {"value": value, "interval": interval, "best": summary.method in best[column.name], "note": note}
                )
            body.append({"method": summary.method, "cells": cells})
        arrows = {True: "higher is better", False: "lower is better", None: ""}
        heads = [{"title": column.title, "arrow": arrows[column.higher_is_better]} for column in columns]
        shown["tables"].append({"heading": section, "heads": heads, "rows": body})
    shown["cost"] = cost_rows(summaries)
    shown["notes"] = [caption(summaries, page.report.n_bins, page.report.resamples, page.report.level)]
    shown["notes"] += undefined_notes(summaries, page.report.columns)
    reliability, _ = page.report.reliability_diagram()
    curves, _ = risk_coverage_diagram({summary.method: summary.risk_coverage for summary in summaries})
    shown["figures"] = [
        {"heading": "Reliability", "picture": _picture(reliability), "alt": "reliability diagrams", "wide": True},
        {"heading": "Risk against coverage", "picture": _picture(curves), "alt": "risk-coverage curves", "wide": False},
    ]
    if page.layers:
        maps, _ = layer_maps(page.layers)
        shown["figures"].append(
            {"heading": "What each layer learned", "picture": _picture(maps), "alt": "maps of layers", "wide": True}
        )
    if page.comparisons:
        shown["comparison"] = {
            "reference": page.reference,
            "heads": _compared_titles(page),
            "rows": _comparison_rows(page),
            "caption": _comparison_caption(page),
        }
    return shown


def _settings_text(page: ExperimentPage) -> str:
    settings = {key: value for key, value in page.settings.items() if value is not None}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()) + "."


def _compared_titles(page: ExperimentPage) -> list[str]:
    titles = {column.name: column.title for column in page.finished.columns}
    return [titles[metric] for metric in COMPARED]


def _comparison_rows(page: ExperimentPage) -> list[list[str]]:
    return [[entry.method, *(p_value_text(entry.tests[metric]) for metric in COMPARED)] for entry in page.comparisons]


def _comparison_caption(page: ExperimentPage) -> str:
    seeds = sorted({entry.seeds for entry in page.comparisons})
    permutations = next(iter(page.comparisons[0].tests.values())).permutations
    return (
        f"Difference to {page.reference} on the same items, mean over {' or '.join(map(str, seeds))} seed(s), with the "
        f"p-value of a paired permutation test over items ({permutations} swaps). It speaks of other test items, not of "
        "other fits, and is not corrected for the number of comparisons."
    )


def _picture(figure: Figure) -> str:
    """The figure as a data URI: an SVG of its own, whose ids cannot collide with another's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _latex(text: str) -> str:
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def _latex_table(rows: list[list[str]], caption: str) -> str:
    head, *body = (" & ".join(row) + r" \\" for row in rows)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption}}}",
            r"\end{table}",
        ]
    )
