"""Oracles: scipy's entropy in float64, torchmetrics' and scikit-learn's detection metrics, pair counting for ties."""

import math

import pytest
import torch
from scipy import special, stats
from sklearn import metrics
from torchmetrics.classification import BinaryAUROC

from pyrolora.inference.evaluation import (
    OOD_SCORES,
    auroc,
    average_precision,
    decompose,
    energy_score,
    false_positive_rate,
    max_probability_uncertainty,
    mutual_information,
    predictive_entropy,
)
from pyrolora.inference.evaluation.detection import DETECTION_METRICS
from pyrolora.inference.predictive import Predictive, RowPrediction


def draws(count=7, examples=40, classes=4, seed=0):
    return torch.randn(count, examples, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def test_decomposition_adds_up_and_equals_entropies():
    probs = draws()
    split = decompose(probs)
    torch.testing.assert_close(split.total, split.aleatoric + split.epistemic, atol=1e-6, rtol=0)
    mean = probs.double().mean(0)
    mean /= mean.sum(-1, keepdim=True)
    torch.testing.assert_close(split.total, torch.from_numpy(stats.entropy(mean.numpy(), axis=-1)), atol=1e-6, rtol=0)
    each = probs.double() / probs.double().sum(-1, keepdim=True)
    aleatoric = torch.from_numpy(stats.entropy(each.numpy(), axis=-1).mean(0))
    torch.testing.assert_close(split.aleatoric, aleatoric, atol=1e-6, rtol=0)
    assert torch.equal(predictive_entropy(probs), split.total)


def test_mutual_information_is_zero_exactly_where_draws_agree():
    probs = draws()
    probs[:, :10] = probs[:1, :10]
    information = mutual_information(probs)
    assert bool((information[:10] == 0).all())
    assert bool((information[10:] > 1e-4).all())
    assert bool((mutual_information(draws(count=1)) == 0).all())


def test_extremes():
    opposite = torch.eye(2)[:, None, :]  # two certain draws that contradict each other
    split = decompose(opposite)
    assert float(split.total) == pytest.approx(math.log(2))
    assert float(split.aleatoric) == 0
    assert float(split.epistemic) == pytest.approx(math.log(2))
    assert float(max_probability_uncertainty(opposite)) == 0.5


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_auroc_equals_torchmetrics_and_pair_counting(scale):
    generator = torch.Generator().manual_seed(2)
    familiar = torch.randn(50, generator=generator).mul(4).round() / 4
    foreign = (torch.randn(30, generator=generator) + 0.7).mul(4).round() / 4
    wins = (foreign[:, None] > familiar).double() + (foreign[:, None] == familiar).double() / 2
    value = float(auroc(familiar * scale, foreign * scale))
    assert value == pytest.approx(float(wins.mean()), abs=1e-6)
    squashed = torch.cat([familiar, foreign]).add(10).div(20)
    oracle = BinaryAUROC()(squashed, torch.cat([torch.zeros(50), torch.ones(30)]).long())
    assert value == pytest.approx(float(oracle), abs=1e-6)


def test_mutual_information_is_undefined_without_disagreement():
    score = OOD_SCORES["mutual_information"]
    one, same, different = draws(count=1), draws(count=1).repeat(5, 1, 1), draws(count=5)
    one, same, nearly, different = (Predictive(probs, "mc") for probs in (one, same, same + 1e-8, different))
    assert score.undefined_reason(one, one) == "undefined for a single draw"
    assert score.undefined_reason(same, nearly) == "undefined because all draws are the same"
    assert score.undefined_reason(different, different) is None
    assert OOD_SCORES["entropy"].undefined_reason(one, one) is None


def test_energy_is_minus_the_log_sum_exp_of_the_logits():
    logits = torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(3)).mul(5)
    made = RowPrediction.from_logits(logits)
    prediction = Predictive(made.probs, "mc", energy=made.energy)
    expected = -special.logsumexp(logits.double().numpy(), axis=-1).mean(0)
    torch.testing.assert_close(energy_score(prediction), torch.from_numpy(expected), atol=1e-5, rtol=0)
    kept = Predictive(made.probs, "linearised")
    assert OOD_SCORES["energy"].undefined_reason(prediction, kept) == "undefined for a prediction that keeps no logits"
    with pytest.raises(ValueError, match="Predict with kind='mc'"):
        energy_score(kept)


def false_positive_rate_by_thresholds(scores, positive):
    rates, recalls, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
    return rates[recalls >= 0.95].min()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.8, 30.0])
def test_detection_metrics_equal_scikit_learn(ties, shift):
    generator = torch.Generator().manual_seed(5)
    familiar, foreign = torch.randn(61, generator=generator), torch.randn(43, generator=generator) + shift
    if ties:
        familiar, foreign = familiar.mul(2).round(), foreign.mul(2).round()
    scores = torch.cat([familiar, foreign]).double().numpy()
    positive = [0] * 61 + [1] * 43
    assert float(auroc(familiar, foreign)) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-6)
    expected = metrics.average_precision_score(positive, scores)
    assert float(average_precision(familiar, foreign)) == pytest.approx(expected, abs=1e-9)
    expected = false_positive_rate_by_thresholds(scores, positive)
    assert float(false_positive_rate(familiar, foreign)) == pytest.approx(expected, abs=1e-9)


def test_detection_metrics_of_one_example_each_and_of_equal_scores():
    for scores, expected in (((0.0, 1.0), (1, 1, 0)), ((1.0, 0.0), (0, 0.5, 1)), ((0.0, 0.0), (0.5, 0.5, 1))):
        familiar, foreign = torch.tensor(scores[:1]), torch.tensor(scores[1:])
        found = (auroc(familiar, foreign), average_precision(familiar, foreign), false_positive_rate(familiar, foreign))
        assert [float(value) for value in found] == list(expected)


def test_resampled_detection_metrics_equal_those_of_each_resample():
    generator = torch.Generator().manual_seed(1)
    familiar = torch.randn(30, generator=generator).mul(3).round()
    foreign = torch.randn(20, generator=generator).add(0.5).mul(3).round()
    counts = [
        torch.nn.functional.one_hot(torch.randint(size, (40, size), generator=generator), size).sum(1).double()
        for size in (30, 20)
    ]
    for metric in DETECTION_METRICS.values():
        fast = metric.resampled(familiar, foreign, *counts)
        for value, inside, outside in zip(fast, *counts, strict=True):
            one = metric.function(familiar.repeat_interleave(inside.long()), foreign.repeat_interleave(outside.long()))
            assert float(value) == pytest.approx(float(one), abs=1e-6), metric.name


def test_bad_input():
    with pytest.raises(ValueError, match=r"probs\[None\]"):
        decompose(draws()[0])
    probs = draws()
    probs[3, 5] = math.nan
    with pytest.raises(ValueError, match="row 5 of draw 3 holds NaN"):
        predictive_entropy(probs)
    with pytest.raises(ValueError, match="out_of_distribution: got scores of shape"):
        auroc(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="in_distribution: the score of row 1 is nan"):
        auroc(torch.tensor([0.0, math.nan]), torch.ones(2))
