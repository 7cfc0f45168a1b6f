"""Pictures of curves, layers and ranks: what they hold, checked on their artists; how they look was looked at."""

import io
import math

import matplotlib.image
import matplotlib.pyplot
import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyrolora.guides import MeanField, Point, build_guide
from pyrolora.inference.diagnostics import SimulationBasedCalibration, layer_summary, rank_diagram
from pyrolora.inference.evaluation import risk_coverage_curve
from pyrolora.inference.evaluation.curves import MAPS, layer_maps, risk_coverage_diagram
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import LastLayer, LoRA


def test_a_notebook_shows_a_picture_that_pyplot_knows_nothing_of():
    curve = risk_coverage_curve(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
    figure, _ = risk_coverage_diagram({"a": curve})
    shown = matplotlib.image.imread(io.BytesIO(figure._repr_png_()))
    assert shown.ndim == 3
    assert shown[..., :3].std() > 0
    assert not matplotlib.pyplot.get_fignums()


def test_risk_coverage_lines_are_the_curves():
    probs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    curve = risk_coverage_curve(probs, torch.zeros(50, dtype=torch.int64))
    _, axes = risk_coverage_diagram({"a": curve, "b": curve}, risk=0.1)
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["a"].get_ydata(), curve.risk)
    assert lines["a"].get_color() != lines["b"].get_color()
    assert axes.texts[0].get_text() == "10% risk"
    assert axes.get_ylim()[1] > float(curve.risk.max())
    with pytest.raises(ValueError, match="got none"):
        risk_coverage_diagram({})


def test_maps_hold_what_there_is(three_topics_model):
    model = three_topics_model(torch.float32, [LoRA(rank=2, layers=(1, 2)), LastLayer()], dist.Normal(0.0, 0.2))
    summaries = {
        "point": layer_summary(Posterior(model, build_guide(Point(), model), {})),
        "wide": layer_summary(Posterior(model, build_guide(MeanField(0.1), model), {})),
    }
    figure, axes = layer_maps(summaries)
    assert axes.shape == (2, len(MAPS))
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["point", "wide"]
    shrinkage = list(MAPS).index("shrinkage")
    assert not axes[0, shrinkage].images, "a point has no width to shrink"
    image = axes[1, shrinkage].images[0].get_array()
    np.testing.assert_allclose(image, 1 - 0.1**2 / 0.2**2, rtol=1e-4)
    assert [label.get_text() for label in axes[1, shrinkage].get_yticklabels()] == [
        "q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B",
    ]  # fmt: skip
    assert axes[1, shrinkage].get_title(loc="left") == MAPS["shrinkage"]
    figure.canvas.draw()
    with pytest.raises(ValueError, match="none with layers"):
        layer_maps({"nothing": xarray.Dataset()})


def test_rank_diagram_draws_the_band_and_every_curve():
    ranks = torch.randint(21, (40, 2), generator=torch.Generator().manual_seed(0))
    one = SimulationBasedCalibration(("a", "b"), ranks, draws=20)
    low = SimulationBasedCalibration(("a", "b"), torch.zeros(40, 2, dtype=torch.int64), draws=20)
    _, axes = rank_diagram({"right": one, "low": low}, "b")
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    points, _, high = one.band()
    # all truths at the bottom: the distribution function is far above uniform
    assert (lines["low"] > high - points + 1e-9).mean() > 0.8
    assert np.abs(lines["right"]).max() < lines["low"].max()
    assert math.isclose(axes.get_xlim()[1], 1)
    for arguments, message in (
        (({}, "a"), "got none"),
        (({"x": one}, "c"), "'x' has no 'c', expected one of 'a', 'b'"),
        (({"x": one, "y": SimulationBasedCalibration(("a",), ranks[:30, :1], 20)}, "a"), "different numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_diagram(*arguments)
