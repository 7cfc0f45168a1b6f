"""Reliability diagrams, drawn without pyplot: they work headless and leave no global state behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from pyrolora.inference.evaluation.calibration import STRATEGIES, CalibrationTable
from pyrolora.inference.picture import Picture

if TYPE_CHECKING:
    from pyrolora.inference.evaluation.report import Report

# Okabe and Ito's palette: distinct under the common colour-vision deficiencies and in grey
ACCURACY_COLOUR = "#0072B2"
GAP_COLOUR = "#E69F00"
COUNT_COLOUR = "#999999"
LABEL_COLOUR = "#333333"
PANELS_PER_LINE = 3
METRIC_OF_STRATEGY = {"width": "ece", "mass": "ece_mass"}


@dataclass(frozen=True)
class _Panel:
    title: str
    table: CalibrationTable
    error: float
    remark: str


def reliability_diagram(
    source: "Report | Mapping[str, CalibrationTable]", *, strategy: str = "width", level: float = 0.95
) -> tuple[Figure, NDArray[Any]]:
    """Draw accuracy against confidence per bin, one panel a method, with the items of each bin counted below.

    ``figure, axes = reliability_diagram({"blob": calibration_curve(probs, labels)})``

    Points on the diagonal are calibrated; below it the model is over-confident. Bands are Wilson intervals of
    the accuracy of a bin. The calibration error written into a panel is the report's metric (its mean over
    seeds), or for a bare table the table's own.

    Args:
        source: a report, or a mapping of method to calibration table.
        strategy: which of a report's tables to draw, ``"width"`` or ``"mass"``.
        level: probability that the bands are to cover.

    Returns:
        The figure and an array of its ``methods`` upper axes.

    Raises:
        ValueError: nothing to draw, or an unknown strategy.

    Guo et al. 2017, "On calibration of modern neural networks", figure 1; Wilson 1927.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}.")
    panels = _panels(source, strategy)
    if not panels:
        raise ValueError("source: got no methods, expected at least one calibration table. Evaluate a posterior first.")
    # four stand better in a square than as three and one
    across = 2 if len(panels) == 4 else min(len(panels), PANELS_PER_LINE)
    down = -(-len(panels) // across)
    # a lone panel needs room for the legend beneath it
    figure = Picture(figsize=(max(3.0 * across, 3.6) + 0.3, 3.55 * down + 0.4), layout="constrained")
    grid = figure.add_gridspec(2 * down, across, height_ratios=[4, 1] * down)
    axes = np.empty(len(panels), dtype=object)
    for index, panel in enumerate(panels):
        line, column = divmod(index, across)
        upper = figure.add_subplot(grid[2 * line, column])
        lower = figure.add_subplot(grid[2 * line + 1, column], sharex=upper)
        _draw_accuracy(upper, panel, level, first=column == 0)
        _draw_counts(lower, panel.table, first=column == 0)
        axes[index] = upper
    figure.legend(
        handles=[
            Line2D([], [], color=LABEL_COLOUR, linestyle="--", linewidth=1, label="calibrated"),
            Line2D([], [], color=ACCURACY_COLOUR, marker="o", markersize=4, label=f"accuracy, {level:.0%} Wilson"),
            Patch(color=GAP_COLOUR, alpha=0.45, label="gap (pale: few items)"),
        ],
        loc="outside lower center",
        ncols=3 if across > 1 else 2,
        frameon=False,
        fontsize=8,
        columnspacing=1.2,
        handlelength=1.6,
    )
    return figure, axes


def wilson_interval(accuracy: Tensor, count: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the Wilson score interval of a proportion.

    ``low, high = wilson_interval(table.accuracy, table.count)``

    Args:
        accuracy: observed proportions.
        count: number of items behind each.
        level: probability that the interval is to cover.

    Shape:
        accuracy, count: ``(bins,)``. Returns two of ``(bins,)``, NaN where there are no items.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z**2 / count
    centre = (accuracy + z**2 / (2 * count)) / shrink
    reach = z / shrink * (accuracy * (1 - accuracy) / count + (z / (2 * count)) ** 2).sqrt()
    return centre - reach, centre + reach


def _panels(source: "Report | Mapping[str, CalibrationTable]", strategy: str) -> list[_Panel]:
    if isinstance(source, Mapping):
        return [
            _Panel(name, table, table.expected_calibration_error, _bins(table.n_bins, table.strategy))
            for name, table in source.items()
        ]
    panels = []
    for summary in source.summaries():
        remark = _bins(source.n_bins, strategy)
        if summary.across_seeds:
            remark += f", mean of {len(summary.rows)} seeds"
        error = summary.metrics[METRIC_OF_STRATEGY[strategy]].value
        panels.append(_Panel(summary.method, summary.calibration[strategy], error, remark))
    return panels


def _bins(n_bins: int, strategy: str) -> str:
    return f"{n_bins} bins of equal {strategy}"


def _draw_accuracy(axes: Axes, panel: _Panel, level: float, *, first: bool) -> None:
    table = panel.table
    filled = table.count > 0
    confidence, accuracy = table.confidence[filled], table.accuracy[filled]
    low, high = wilson_interval(accuracy, table.count[filled], level)
    left, width = table.edges[:-1][filled], table.edges.diff()[filled]
    # faded where few items stand behind it, as such a gap weighs little in the calibration error
    weight = 0.12 + 0.5 * (table.count[filled] / table.count.max()).sqrt()
    axes.bar(
        left.numpy(),
        (accuracy - confidence).numpy(),
        width.numpy(),
        bottom=confidence.numpy(),
        align="edge",
        color=[to_rgba(GAP_COLOUR, alpha) for alpha in weight.tolist()],
        linewidth=0,
    )
    axes.plot([0, 1], [0, 1], color=LABEL_COLOUR, linestyle="--", linewidth=1, zorder=2)
    # rounding may leave an end of the band on the wrong side of an accuracy of exactly 0 or 1
    reach = torch.stack([accuracy - low, high - accuracy]).clamp(min=0)
    axes.errorbar(
        confidence.numpy(),
        accuracy.numpy(),
        yerr=reach.numpy(),
        color=ACCURACY_COLOUR,
        marker="o",
        markersize=4,
        linestyle="none",
        elinewidth=1.2,
        capsize=1.5,
        zorder=3,
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03))
    axes.set_title(panel.title, loc="left", fontsize=10, weight="bold", pad=18)
    axes.text(0, 1.03, f"ECE {panel.error:.3f}", transform=axes.transAxes, fontsize=8.5, color="black")
    axes.text(1, 1.03, panel.remark, transform=axes.transAxes, fontsize=7.5, color=LABEL_COLOUR, ha="right")
    axes.tick_params(labelsize=8, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    if first:
        axes.set_ylabel("accuracy", fontsize=9)
    else:
        axes.tick_params(labelleft=False)


def _draw_counts(axes: Axes, table: CalibrationTable, *, first: bool) -> None:
    left, width, count = table.edges[:-1], table.edges.diff(), table.count
    axes.bar(
        left.numpy(),
        count.numpy(),
        width.numpy(),
        align="edge",
        color=COUNT_COLOUR,
        edgecolor="white",
        linewidth=0.5,
    )
    tallest = float(count.max())
    axes.set_ylim(0, 1.7 * tallest)
    # bins narrower than a number would print over each other
    if float(width[count > 0].min()) > 0.045:
        for middle, items in zip((left + width / 2).tolist(), count.tolist(), strict=True):
            if items > 0:
                axes.text(
                    middle,
                    items + 0.06 * tallest,
                    f"{items:.0f}",
                    ha="center",
                    va="bottom",
                    fontsize=6,
                )
    else:
        axes.text(
            0.04,
            0.92,
            _count_range(count),
            transform=axes.transAxes,
            va="top",
            fontsize=7.5,
            color=LABEL_COLOUR,
        )
    axes.set_xlabel("confidence", fontsize=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if first:
        axes.set_ylabel("items", fontsize=9)


def _count_range(count: Tensor) -> str:
    filled = count[count > 0]
    fewest, most = f"{float(filled.min()):.0f}", f"{float(filled.max()):.0f}"
    return f"{fewest} items in each bin" if fewest == most else f"{fewest} to {most} items in a bin"
