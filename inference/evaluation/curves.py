"""Pictures of a report beyond reliability: risk against coverage, and what each layer learned."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pyrolora.inference.evaluation.plots import LABEL_COLOUR
from pyrolora.inference.evaluation.selective import RiskCoverage
from pyrolora.inference.picture import Picture

# Okabe and Ito's palette without its yellow, which vanishes on white; then the same colours dashed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":")
BORNE_RISK = 0.05
MAPS = {
    "change_norm": "norm of the change",
    "effective_rank": "effective rank of the change",
    "shrinkage": "shrinkage (1 - posterior / prior variance)",
    "signal_to_noise": "signal to noise of a weight",
}


def risk_coverage_diagram(curves: Mapping[str, RiskCoverage], *, risk: float = BORNE_RISK) -> tuple[Figure, Axes]:
    """Error rate among the items answered, against their share: ``risk_coverage_diagram({"blob": curve})``.

    Lower is better. Where a curve last crosses the dashed line is the method's coverage at that risk.

    Args:
        curves: name -> curve, from `risk_coverage_curve` or a `Summary`.
        risk: error rate at which a line is drawn.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: no curve.
    """
    if not curves:
        raise ValueError("curves: got none, expected at least one. Evaluate a posterior first.")
    figure = Picture(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(
            curve.coverage.numpy(),
            curve.risk.numpy(),
            label=name,
            linewidth=1.6,
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
        )
    axes.axhline(risk, color=LABEL_COLOUR, linewidth=0.9, linestyle="--")
    axes.text(0.995, risk, f"{risk:.0%} risk", fontsize=8, va="bottom", ha="right", color=LABEL_COLOUR)
    highest = max(float(curve.risk.max()) for curve in curves.values())
    axes.set(xlim=(0, 1), ylim=(0, max(1.1 * highest, 1.5 * risk)))
    axes.set_xlabel("coverage: share of items answered, most confident first", fontsize=9)
    axes.set_ylabel("risk: error rate among them", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure, axes


def layer_maps(summaries: Mapping[str, xarray.Dataset]) -> tuple[Figure, NDArray[Any]]:
    """What each layer learned: one row of panels a method, one map a quantity: ``layer_maps({"blob": layer_summary(blob)})``.

    Args:
        summaries: name -> what `layer_summary` returned.

    Returns:
        The figure and an array of its axes, ``(methods, quantities)``.

    Raises:
        ValueError: no summary, or none with a layer.
    """
    found = {name: _layered(summary) for name, summary in summaries.items()}
    found = {name: maps for name, maps in found.items() if maps}
    if not found:
        raise ValueError("summaries: got none with layers, expected what layer_summary returns for an adapted network.")
    shown = [key for key in MAPS if any(key in maps for maps in found.values())]
    tallest = max(len(label) for maps in found.values() for values in maps.values() for label in values.labels)
    rows = [max(len(values.labels) for values in maps.values()) for maps in found.values()]
    figure = Picture(
        figsize=(2.9 * len(shown) + 0.07 * tallest, 0.3 * sum(rows) + 0.85 * len(rows) + 0.3), layout="constrained"
    )
    grid = figure.subplots(len(found), len(shown), squeeze=False, gridspec_kw={"height_ratios": rows})
    for place, (key, column) in enumerate(zip(shown, grid.T, strict=True)):
        titled = next(name for name, maps in found.items() if key in maps)
        peak = max((float(np.nanmax(maps[key].values)) for maps in found.values() if key in maps), default=1.0)
        for (name, maps), axes in zip(found.items(), column, strict=True):
            if key not in maps:
                axes.set_axis_off()
                continue
            _draw_map(figure, axes, maps[key], peak)
            if name == titled:
                axes.set_title(MAPS[key], fontsize=8.5, loc="left")
            if name == list(found)[-1]:
                axes.set_xlabel("block", fontsize=8)
            if place == 0:
                axes.set_ylabel(name, fontsize=9, weight="bold")
    return figure, grid


class _Map:
    def __init__(self, labels: list[str], layers: list[int], values: NDArray[Any]) -> None:
        self.labels, self.layers, self.values = labels, layers, values


def _layered(summary: xarray.Dataset) -> dict[str, _Map]:
    """The maps that hold a number, without rows or layers that do not."""
    found = {}
    for key in MAPS:
        if key not in summary:
            continue
        values = summary[key]
        rows = next(dim for dim in values.dims if dim != "layer")
        kept = values.where(values.layer >= 0, drop=True).dropna(rows, how="all")
        kept = kept.where(np.isfinite(kept))
        if not kept.size or not bool(np.isfinite(kept).any()):
            continue
        found[key] = _Map([str(label) for label in kept[rows].values], kept.layer.values.tolist(), kept.values)
    return found


def _draw_map(figure: Figure, axes: Axes, shown: _Map, peak: float) -> None:
    lowest = min(0.0, float(np.nanmin(shown.values)))
    image = axes.imshow(
        shown.values, aspect="auto", cmap="cividis", vmin=lowest, vmax=max(peak, lowest + 1e-9), interpolation="nearest"
    )
    axes.set_yticks(range(len(shown.labels)), shown.labels, fontsize=7.5)
    step = max(1, len(shown.layers) // 6)
    axes.set_xticks(range(0, len(shown.layers), step), [str(layer) for layer in shown.layers[::step]], fontsize=7.5)
    axes.tick_params(length=2)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
