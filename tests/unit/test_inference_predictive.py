"""Energies and temperatures in prediction; oracle: the model's own logits under the same draws."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import MeanField, build_guide
from pyrolora.inference.evaluation import TemperatureScaling, fit_temperature, temperature_scaled
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import RowPrediction
from pyrolora.models.adapters import LastLayer
from pyrolora.models.tasks import Split


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def posterior(three_topics_model):
    model = three_topics_model(torch.float64, prior=dist.Normal(0.0, 0.5))
    return Posterior(model, build_guide(MeanField(0.3), model), {"engine": "none"})


@pytest.fixture
def unruly(posterior):
    """Validation data that no model answers without error: the labels are rotated."""
    test = posterior.model.task.test
    return Split("validation", test.task, test.examples, 3)


@pytest.mark.parametrize("kind", ["mc", "mean"])
def test_energy_is_that_of_the_models_logits(posterior, kind):
    encoded = posterior.model.encode(posterior.model.task.test)
    batch = encoded.batch(list(range(9)))
    draw = posterior.sample(4, generator=seeded()) if kind == "mc" else posterior.mean()
    with torch.no_grad():
        logits = posterior.model.logits(batch, draw)
    # three batches in order of length, put back into the order of the data
    predictive = posterior.predict(encoded, draws=4, kind=kind, generator=seeded(), batch_size=4)
    torch.testing.assert_close(predictive.energy.double(), -logits.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(predictive.probs.double(), logits.softmax(-1), atol=1e-6, rtol=0)


def test_tempering_divides_logits_and_keeps_impossible_options():
    logits = torch.tensor([[[1.0, 3.0, -math.inf]]])
    made = RowPrediction.from_logits(logits).tempered(2.0)
    torch.testing.assert_close(made.probs, (logits / 2).softmax(-1))
    assert float(made.energy) == pytest.approx(-math.log(math.e + math.e**3))


def test_a_scaled_posterior_predicts_with_its_temperature_and_keeps_it(posterior, unruly, tmp_path):
    plain = posterior.predict(unruly, draws=3, generator=seeded())
    scaled = temperature_scaled(posterior, unruly, draws=3, generator=seeded())
    expected = fit_temperature(plain.probs, plain.labels)
    assert scaled.logit_temperature == pytest.approx(expected)
    assert scaled.logit_temperature != pytest.approx(1, abs=0.01)
    assert posterior.logit_temperature == 1
    again = scaled.predict(unruly, draws=3, generator=seeded())
    torch.testing.assert_close(again.probs, (plain.probs.log() / expected).softmax(-1), atol=1e-6, rtol=0)
    scaled.save_pretrained(tmp_path / "kept")
    loaded = Posterior.from_pretrained(tmp_path / "kept", model=posterior.model)
    assert torch.equal(loaded.predict(unruly, draws=3, generator=seeded()).probs, again.probs)
    # scaling what is scaled starts from the plain logits
    assert temperature_scaled(scaled, unruly, draws=3, generator=seeded()).logit_temperature == pytest.approx(expected)


def test_a_linearised_posterior_is_scaled_in_its_own_kind(three_topics_model):
    model = three_topics_model(torch.float32, adapter=LastLayer(), prior=dist.Normal(0.0, 0.3))
    engine = Laplace(structure="last_layer", estimate=MAP(steps=3, batch_size=6))
    laplace = engine.fit(model, model.task.train, progress=False)
    scaled = temperature_scaled(laplace, model.task.test, generator=seeded())
    assert type(scaled) is type(laplace)
    predictive = scaled.predict(model.task.test, generator=seeded())
    assert predictive.kind == laplace.default_kind
    plain = laplace.predict(model.task.test, generator=seeded())
    expected = (plain.probs.log() / scaled.logit_temperature).softmax(-1)
    torch.testing.assert_close(predictive.probs, expected, atol=1e-6, rtol=0)


def test_the_engine_says_what_it_lacks(posterior, unruly):
    model = posterior.model
    engine = TemperatureScaling(draws=2)
    scaled = engine.fit(
        model, model.task.train, estimate=posterior, validation=unruly, generator=seeded(), progress=False
    )
    assert scaled.logit_temperature > 0
    with pytest.raises(ValueError, match="pass estimate= to fit"):
        engine.fit(model, model.task.train, validation=unruly)
    with pytest.raises(ValueError, match="pass validation= to fit"):
        engine.fit(model, model.task.train, estimate=posterior)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        TemperatureScaling(draws=0)
