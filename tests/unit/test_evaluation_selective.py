"""Selective prediction; oracles: loops over every order of equals, over every threshold, and closed forms."""

import itertools
import math

import pytest
import torch

from pyrolora.inference.evaluation import area_under_risk_coverage, coverage_at_risk, risk_coverage_curve
from pyrolora.inference.evaluation.selective import RiskCoverage, resampled_area, resampled_coverage


def predictions(examples=200, ties=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(examples, 3, generator=generator).mul(2).softmax(-1)
    if ties:
        probs = probs[torch.arange(examples) // 7]
    labels = torch.where(
        torch.rand(examples, generator=generator) < 0.7,
        probs.argmax(1),
        torch.randint(3, (examples,), generator=generator),
    )
    return probs, labels


def area_by_loop(confidence, wrong):
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    errors, total = 0.0, 0.0
    for answered, i in enumerate(order, start=1):
        errors += wrong[i]
        total += errors / answered
    return total / len(order)


def test_area_equals_a_loop_without_ties():
    probs, labels = predictions()
    confidence, predicted = probs.max(1)
    expected = area_by_loop(confidence.tolist(), (predicted != labels).double().tolist())
    assert float(area_under_risk_coverage(probs, labels)) == pytest.approx(expected, abs=1e-12)


def test_area_and_curve_are_the_mean_over_all_orders_of_equals():
    # two confidences of three examples each; labels make errors in both groups
    probs = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]] * 3)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    wrong = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    orders = [a + b for a in itertools.permutations(wrong[:3]) for b in itertools.permutations(wrong[3:])]
    means = [sum(sum(order[:k]) / k for order in orders) / len(orders) for k in range(1, 7)]
    assert float(area_under_risk_coverage(probs, labels)) == pytest.approx(sum(means) / 6, abs=1e-12)
    curve = risk_coverage_curve(probs, labels, points=6)
    assert curve.coverage.tolist() == pytest.approx([k / 6 for k in range(1, 7)])
    assert curve.risk.tolist() == pytest.approx(means, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_coverage_equals_the_best_of_all_thresholds(ties):
    probs, labels = predictions(ties=ties)
    confidence, predicted = probs.max(1)
    for risk in (0.0, 0.05, 0.2, 1.0):
        best = 0.0
        for threshold in confidence:
            answered = confidence >= threshold
            if float((predicted != labels)[answered].double().mean()) <= risk + 1e-12:
                best = max(best, float(answered.double().mean()))
        assert float(coverage_at_risk(probs, labels, risk)) == pytest.approx(best, abs=1e-12)


def test_an_error_in_exactly_twenty_is_five_per_cent():
    confidence = torch.linspace(0.9, 0.6, 20)
    labels = torch.zeros(20, dtype=torch.int64)
    labels[7] = 1
    assert float(coverage_at_risk(torch.stack([confidence, 1 - confidence], 1), labels, 0.05)) == 1
    assert float(coverage_at_risk(torch.stack([confidence, 1 - confidence], 1)[:19], labels[:19], 0.05)) == 7 / 19


def test_degenerate_predictions():
    right = torch.tensor([[0.8, 0.2]])
    assert float(area_under_risk_coverage(right, torch.tensor([0]))) == 0
    assert float(coverage_at_risk(right, torch.tensor([0]))) == 1
    assert float(area_under_risk_coverage(right, torch.tensor([1]))) == 1
    assert float(coverage_at_risk(right, torch.tensor([1]))) == 0
    # nothing to rank by: the expected risk is the error rate at every coverage
    probs, labels = torch.full((9, 3), 1 / 3), torch.tensor([0, 1, 2] * 3)
    assert float(area_under_risk_coverage(probs, labels)) == pytest.approx(2 / 3, abs=1e-12)
    assert risk_coverage_curve(probs, labels).risk.tolist() == pytest.approx([2 / 3] * 9)
    assert float(coverage_at_risk(probs, labels)) == 0


def test_another_uncertainty_ranks_the_examples():
    probs, labels = predictions()
    perfect = (probs.argmax(1) != labels).double()
    assert float(coverage_at_risk(probs, labels, 0.0, uncertainty=perfect)) == pytest.approx(1 - float(perfect.mean()))
    errors, n = int(perfect.sum()), len(labels)
    best = sum(max(0, k - (n - errors)) / k for k in range(1, n + 1)) / n
    assert float(area_under_risk_coverage(probs, labels, uncertainty=perfect)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_resamples_equal_the_examples_written_out(ties):
    probs, labels = predictions(60, ties)
    drawn = torch.randint(60, (20, 60), generator=torch.Generator().manual_seed(1))
    counts = torch.nn.functional.one_hot(drawn, 60).sum(1).double()
    for area, coverage, rows in zip(
        resampled_area(probs, labels, counts), resampled_coverage(probs, labels, counts), drawn, strict=True
    ):
        assert float(area) == pytest.approx(float(area_under_risk_coverage(probs[rows], labels[rows])), abs=1e-10)
        assert float(coverage) == pytest.approx(float(coverage_at_risk(probs[rows], labels[rows])), abs=1e-12)


def test_curve_survives_json_and_ends_at_the_error_rate():
    probs, labels = predictions(1000)
    curve = risk_coverage_curve(probs, labels)
    again = RiskCoverage.from_dict(curve.to_dict())
    assert torch.equal(again.risk, curve.risk)
    assert len(curve.coverage) == 100
    assert float(curve.coverage[-1]) == 1
    assert float(curve.risk[-1]) == pytest.approx(float((probs.argmax(1) != labels).double().mean()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y: coverage_at_risk(p, y, 1.5), "risk: got 1.5"),
        (lambda p, y: coverage_at_risk(p, y, math.nan), "risk: got nan"),
        (lambda p, y: risk_coverage_curve(p, y, points=0), "points: got 0"),
        (lambda p, y: area_under_risk_coverage(p, y, uncertainty=torch.ones(3)), r"got shape \(3,\) for 200 examples"),
        (lambda p, y: area_under_risk_coverage(p, y, uncertainty=torch.full((200,), math.nan)), "one finite number"),
        (lambda p, y: area_under_risk_coverage(p, y[:5]), "one label for each row"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*predictions())
