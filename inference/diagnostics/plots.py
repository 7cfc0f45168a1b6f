"""Pictures of diagnostics."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyrolora.inference.diagnostics.simulation import SimulationBasedCalibration
from pyrolora.inference.evaluation.curves import COLOURS
from pyrolora.inference.evaluation.plots import LABEL_COLOUR
from pyrolora.inference.picture import Picture


def rank_diagram(
    calibrations: Mapping[str, SimulationBasedCalibration], quantity: str, *, level: float = 0.95
) -> tuple[Figure, Axes]:
    """Distribution function of the ranks minus that of uniform ones: ``rank_diagram({"svi": found}, "log likelihood")``.

    Inside the band is calibrated. An arch rising first is a posterior that is too narrow on that side: the truth falls
    below its draws too often.

    Args:
        calibrations: name -> calibration, all with the same number of simulations.
        quantity: one of their names.
        level: probability that the band holds a whole uniform curve.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: no calibration, another number of simulations, or a quantity that one of them lacks.
    """
    if not calibrations:
        raise ValueError("calibrations: got none, expected at least one. Run calibrate_engine first.")
    if len({len(one.ranks) for one in calibrations.values()}) > 1:
        raise ValueError(
            "calibrations: got different numbers of simulations, expected the same, for they share one band."
        )
    for name, one in calibrations.items():
        if quantity not in one.names:
            raise ValueError(
                f"quantity: {name!r} has no {quantity!r}, expected one of {', '.join(map(repr, one.names))}."
            )
    points, low, high = next(iter(calibrations.values())).band(level)
    figure = Picture(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(points, low - points, high - points, color="0.88", linewidth=0, label=f"{level:.0%} band")
    axes.axhline(0, color=LABEL_COLOUR, linewidth=0.8)
    for index, (name, one) in enumerate(calibrations.items()):
        values = np.sort(one.uniform[:, one.names.index(quantity)].numpy())
        below = np.searchsorted(values, points, side="right") / len(values)
        axes.step(points, below - points, where="mid", linewidth=1.5, color=COLOURS[index % len(COLOURS)], label=name)
    axes.set(xlim=(0, 1))
    axes.set_title(quantity, fontsize=10, loc="left", weight="bold")
    axes.set_xlabel("rank of the truth among the draws, as a share", fontsize=9)
    axes.set_ylabel("observed minus uniform", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure, axes
