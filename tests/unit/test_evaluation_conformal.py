"""Prediction sets; oracles: sets built class by class from the papers' definitions, and the finite-sample promise."""

import math

import pytest
import torch

from pyrolora.inference.evaluation import conformalise

# 400 splits of 60 + 40 examples estimate a coverage to about 0.003; the bounds below are five standard errors wide
FALSE_ALARM_RATE = 1e-6
SPLITS, CALIBRATION, TEST = 400, 60, 40


def predictions(examples, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(examples, classes, generator=generator) * 1.5
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    # overconfident, which no promise of coverage minds
    return (2 * logits).softmax(-1).double(), labels


def set_by_hand(row, threshold, score, uniform):
    order = sorted(range(len(row)), key=lambda k: -row[k])
    chosen, likelier = set(), 0.0
    for k in order:
        value = 1 - row[k] if score == "split" else likelier + uniform * row[k]
        if value <= threshold:
            chosen.add(k)
        likelier += row[k]
    return chosen


@pytest.mark.parametrize("score", ["split", "aps"])
def test_sets_and_threshold_follow_the_definition(score):
    probs, labels = predictions(50)
    conformal = conformalise(probs, labels, miscoverage=0.2, score=score, seed=None)
    scores = []
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        likelier = sum(value for value in row if value > row[label])
        scores.append(1 - row[label] if score == "split" else likelier + row[label])
    # ceil(51 * 0.8) = 41st of 50
    assert conformal.threshold == pytest.approx(sorted(scores)[40], abs=1e-12)
    fresh, fresh_labels = predictions(30, seed=1)
    sets = conformal.sets(fresh)
    expected = [set_by_hand(row, conformal.threshold, score, 1.0) for row in fresh.tolist()]
    assert [set(row.nonzero()[:, 0].tolist()) for row in sets] == expected
    quality = conformal.judge(fresh, fresh_labels)
    covered = [label in one for label, one in zip(fresh_labels.tolist(), expected, strict=True)]
    assert quality.coverage == pytest.approx(sum(covered) / 30)
    assert quality.mean_size == pytest.approx(sum(map(len, expected)) / 30)
    assert quality.empty == pytest.approx(sum(not one for one in expected) / 30)


@pytest.mark.parametrize("score", ["split", "aps"])
@pytest.mark.parametrize("miscoverage", [0.1, 0.25])
def test_coverage_is_what_was_promised_and_little_more(score, miscoverage):
    covered = []
    for split in range(SPLITS):
        probs, labels = predictions(CALIBRATION + TEST, seed=split)
        conformal = conformalise(
            probs[:CALIBRATION], labels[:CALIBRATION], miscoverage=miscoverage, score=score, seed=split
        )
        covered.append(conformal.judge(probs[CALIBRATION:], labels[CALIBRATION:]).coverage)
    covered = torch.tensor(covered)
    error = 5 * float(covered.std()) / math.sqrt(SPLITS)
    assert float(covered.mean()) >= 1 - miscoverage - error
    # scores without ties: at most 1 / (n + 1) above the promise
    assert float(covered.mean()) <= 1 - miscoverage + 1 / (CALIBRATION + 1) + error


def test_too_few_calibration_examples_give_sets_of_everything():
    probs, labels = predictions(8)
    conformal = conformalise(probs, labels, miscoverage=0.1)
    assert math.isinf(conformal.threshold)
    assert bool(conformal.sets(predictions(5, seed=2)[0]).all())
    assert math.isfinite(conformalise(*predictions(9), miscoverage=0.1).threshold)


def test_one_certain_class():
    probs = torch.tensor([[1.0, 0.0]]).repeat(30, 1)
    conformal = conformalise(probs, torch.zeros(30, dtype=torch.int64), score="aps", seed=None)
    assert conformal.sets(probs).sum(1).eq(2).all(), "without random numbers the last class of no mass fits in"
    assert conformalise(probs, torch.zeros(30, dtype=torch.int64)).sets(probs).tolist() == [[True, False]] * 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "apps"}, "Did you mean 'aps'"),
        ({"miscoverage": 0.0}, "strictly between 0 and 1"),
        ({"miscoverage": math.nan}, "strictly between 0 and 1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one label for each row"),
    ],
)
def test_bad_input(changes, message):
    probs, labels = predictions(20)
    arguments = {"probs": probs, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        conformalise(**arguments)
    with pytest.raises(ValueError, match="Average the draws first"):
        conformalise(probs, labels).sets(probs[None])
