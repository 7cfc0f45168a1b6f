"""A report as Markdown that is as readable in a terminal as on a page."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pyrolora.inference.evaluation.aggregate import Row, Summary
from pyrolora.inference.evaluation.bootstrap import Interval

MISSING = "-"
CAPTION_WIDTH = 110


@dataclass(frozen=True)
class Column:
    """A metric as a table shows it.

    Attributes:
        name: key in the rows' metrics.
        title: heading.
        higher_is_better: which end is the good one; None where neither is.
        section: heading of the table that it stands in.
        interval_digits: decimals of the interval's ends.
    """

    name: str
    title: str
    higher_is_better: bool | None
    section: str = "Test items"
    interval_digits: int = 2


def render_markdown(
    summaries: Sequence[Summary], columns: Sequence[Column], n_bins: int, resamples: int, level: float
) -> str:
    """Return one table a section and a caption.

    ``print(report.to_markdown())``

    The best value of a column is bold; values that print alike are equally good.

    Args:
        summaries: one a method.
        columns: the metrics, in order.
        n_bins: bins of the calibration errors.
        resamples: bootstrap resamples behind single-seed intervals.
        level: probability that the intervals are to cover.
    """
    mixed = len({summary.across_seeds for summary in summaries}) > 1
    names = [
        summary.method.replace("|", "\\|") + (" †" if mixed and not summary.across_seeds else "")
        for summary in summaries
    ]
    parts = []
    for section in dict.fromkeys(column.section for column in columns):
        body = [_metric_cells(column, summaries) for column in columns if column.section == section]
        parts.append(f"### {section}\n\n" + _table([["Method", *names], *body]))
    parts.append("### Cost\n\n" + _table([["Method", *names], *_cost_cells(summaries)]))
    parts.append(textwrap.fill(caption(summaries, n_bins, resamples, level), CAPTION_WIDTH, break_on_hyphens=False))
    notes = undefined_notes(summaries, columns)
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _metric_cells(column: Column, summaries: Sequence[Summary]) -> list[str]:
    intervals = [summary.metrics[column.name] for summary in summaries]
    values = [interval.value if interval.defined else None for interval in intervals]
    shown = _with_best_bold(values, column.higher_is_better, "{:.3f}".format)
    return [
        column.title,
        *(_with_ends(text, interval, column) for text, interval in zip(shown, intervals, strict=True)),
    ]


def _with_ends(text: str, interval: Interval, column: Column) -> str:
    digits = column.interval_digits
    return f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval.defined else "undefined"


def _cost_cells(summaries: Sequence[Summary]) -> list[list[str]]:
    seconds = [summary.fit_seconds for summary in summaries]
    peaks = [summary.peak_memory_bytes for summary in summaries]
    mebibytes = [None if peak is None else peak / 2**20 for peak in peaks]
    return [
        ["Fit (s)", *_with_best_bold(seconds, False, "{:.1f}".format)],
        ["Peak memory (MiB)", *_with_best_bold(mebibytes, False, "{:.0f}".format)],
        [
            "Predict (s)",
            *_with_best_bold([summary.predict_seconds for summary in summaries], False, "{:.2f}".format),
        ],
    ]


def _with_best_bold(
    values: Sequence[float | None], higher_is_better: bool | None, text: Callable[[float], str]
) -> list[str]:
    known = [value for value in values if value is not None]
    # with a single method nothing is best, nor where all are alike
    judged = higher_is_better is not None and len({text(value) for value in known}) > 1
    best = text(max(known) if higher_is_better else min(known)) if judged else None
    shown = [MISSING if value is None else text(value) for value in values]
    return [f"**{cell}**" if cell == best else cell for cell in shown]


def _table(columns: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def cost_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """The cost table as rows of text, headings first: ``cost_rows(report.summaries())``."""
    columns = [["Method", *(summary.method for summary in summaries)], *_cost_cells(summaries)]
    return [[cell.replace("**", "") for cell in row] for row in zip(*columns, strict=True)]


def caption(summaries: Sequence[Summary], n_bins: int, resamples: int, level: float) -> str:
    """What the numbers of a table are: sizes, draws, seeds and intervals; arguments as `render_markdown`."""
    mixed = len({summary.across_seeds for summary in summaries}) > 1
    rows = [row for summary in summaries for row in summary.rows]
    sizes = [f"{_spread(row.examples for row in rows)} test items"]
    for name in dict.fromkeys(name for row in rows for name in row.ood_examples):
        foreign = (row.ood_examples[name] for row in rows if name in row.ood_examples)
        sizes.append(f"{_spread(foreign)} foreign items of {name}")
    for name in dict.fromkeys(name for row in rows for name in row.shift_examples):
        shifted = (row.shift_examples[name] for row in rows if name in row.shift_examples)
        sizes.append(f"{_spread(shifted)} shifted items of {name}")
    bootstrap = f"{level:.0%} bootstrap over items ({resamples} resamples)"
    across = f"{level:.0%} t-interval across seeds (values are means over seeds)"
    if mixed:
        intervals = f"{across}; † has a single seed: {bootstrap}"
    else:
        intervals = across if any(summary.across_seeds for summary in summaries) else bootstrap
    seeds = sorted({row.seed for row in rows})
    text = (
        f"{', '.join(sizes)}; {_draws(summaries)}; calibration errors with {n_bins} bins, L1, top label; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. Intervals: {intervals}. "
        "Bold: best of the column."
    )
    if any(not summary.across_seeds for summary in summaries):
        text += " Resampling biases a calibration error upwards: its interval sits high and may miss the value."
    return text


def _draws(summaries: Sequence[Summary]) -> str:
    def described(row: Row) -> str:
        return f"{row.draws} {'draw' if row.draws == 1 else 'draws'} ({row.kind})"

    methods: dict[str, list[str]] = {}
    for summary in summaries:
        methods.setdefault(" or ".join(dict.fromkeys(map(described, summary.rows))), []).append(summary.method)
    if len(methods) == 1:
        return next(iter(methods))
    return ", ".join(f"{how} for {', '.join(names)}" for how, names in methods.items())


def undefined_notes(summaries: Sequence[Summary], columns: Sequence[Column]) -> list[str]:
    """Why some values are undefined, one sentence for each column and reason; arguments as `render_markdown`."""
    methods: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        for summary in summaries:
            interval = summary.metrics[column.name]
            if not interval.defined:
                methods.setdefault((column.title, interval.note or "undefined"), []).append(summary.method)
    return [f"{title}: {reason} ({', '.join(names)})." for (title, reason), names in methods.items()]


def _spread(sizes: Iterable[int]) -> str:
    different = sorted(set(sizes))
    return str(different[0]) if len(different) == 1 else f"{different[0]} to {different[-1]}"
