"""Simulated data with a known answer. Seeds are fixed; the rates say how often another seed would fail."""

import torch

from pyrolora.inference.evaluation import (
    bootstrap_detection,
    bootstrap_metrics,
    classification_metrics,
    ece_equal_mass,
    ece_equal_width,
)


def simulated(examples, sharpening, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(examples, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return (sharpening * logits).softmax(-1), labels


def test_calibrated_data_has_almost_no_calibration_error():
    """Fails with probability below 2e-6 under another seed.

    The expected error is at most sqrt(bins / N) / 2 = 0.0137; one label moves it by at most 1/N, so by
    McDiarmid it exceeds that by 0.0186 with probability below exp(-2 * 20000 * 0.0186^2) = 1e-6, for each of
    the two metrics.
    """
    probs, labels = simulated(20_000, sharpening=1.0, seed=0)
    assert float(ece_equal_width(probs, labels)) < 0.0323
    assert float(ece_equal_mass(probs, labels)) < 0.0323
    overconfident, labels = simulated(20_000, sharpening=2.0, seed=0)
    assert float(ece_equal_width(overconfident, labels)) > 0.08
    assert float(ece_equal_mass(overconfident, labels)) > 0.08


def test_bootstrap_interval_covers_a_bernoulli_mean():
    """Fails with probability below 2e-3 under another seed.

    400 data sets of 200 examples, true accuracy 0.7. The percentile interval covers 0.94 of the time or so;
    four standard deviations of a binomial share at 0.94 (0.012) below that is 0.892, and 0.985 lies as far
    above.
    """
    metric = classification_metrics()["accuracy"]
    probs = torch.tensor([[0.9, 0.1]]).expand(200, 2)
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(400):
        labels = (torch.rand(200, generator=generator) > 0.7).long()
        interval = bootstrap_metrics([metric], probs, labels, resamples=400, seed=trial)["accuracy"]
        covered += interval.low <= 0.7 <= interval.high
    assert 0.892 < covered / 400 < 0.985


def test_bootstrap_interval_covers_the_auroc_of_two_normals():
    """Fails with probability below 2e-3 under another seed.

    The AUROC of N(0, 1) against N(1, 1) is Phi(1 / sqrt 2); 200 data sets, standard deviation 0.017.
    """
    truth = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(0.5).sqrt()))
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for trial in range(200):
        familiar, foreign = torch.randn(120, generator=generator), torch.randn(80, generator=generator) + 1
        interval = bootstrap_detection(familiar, foreign, resamples=300, seed=trial)["auroc"]
        covered += interval.low <= truth <= interval.high
    assert 0.87 < covered / 200 < 0.995


def test_resampling_biases_the_calibration_error_upwards():
    """Fails under fewer than 1 in 100 other seeds: none of 300 did.

    The middle of the interval lies 0.7 (equal width) or 0.9 (equal mass) of its half-width above the value.
    """
    probs, labels = simulated(600, sharpening=1.0, seed=3)
    for name in ("ece", "ece_mass"):
        interval = bootstrap_metrics([classification_metrics()[name]], probs, labels)[name]
        assert (interval.low + interval.high) / 2 > interval.value
