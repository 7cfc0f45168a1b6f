"""Oracles: each metric, torchmetrics included, called on the resample written out example by example."""

import math
import time

import pytest
import torch

from pyrolora.inference.evaluation import (
    Interval,
    auroc,
    bootstrap_detection,
    bootstrap_metrics,
    classification_metrics,
    paired_difference,
)
from pyrolora.inference.evaluation import bootstrap as bootstrap_module
from pyrolora.inference.evaluation.bootstrap import resample_counts
from pyrolora.inference.evaluation.detection import resampled_auroc


def predictions(examples=120, classes=4, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(examples, classes, generator=generator).mul(2).softmax(-1)
    if ties:
        probs = probs[torch.arange(examples) // 5]
    return probs, torch.randint(classes, (examples,), generator=generator)


def counts_of(examples, resamples=25, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(list(resample_counts(examples, resamples, level=0.5, generator=generator)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", list(classification_metrics()))
def test_resampled_metric_equals_the_metric_of_each_resample(name, ties):
    probs, labels = predictions(ties=ties)
    probs[:8] = torch.eye(4)[torch.arange(8) % 4]  # exact ones: torchmetrics' bin of its own
    metric = classification_metrics(n_bins=10)[name]
    counts = counts_of(len(labels))
    fast = metric.resampled(probs, labels, counts)
    for value, count in zip(fast, counts, strict=True):
        rows = torch.repeat_interleave(torch.arange(len(labels)), count.long())
        assert float(value) == pytest.approx(float(metric.function(probs[rows], labels[rows])), abs=2e-6)


def test_resampled_auroc_equals_torchmetrics_of_each_resample():
    generator = torch.Generator().manual_seed(1)
    familiar = torch.randn(70, generator=generator).mul(3).round()
    foreign = torch.randn(40, generator=generator).add(0.5).mul(3).round()
    inside, outside = counts_of(70, seed=4), counts_of(40, seed=5)
    fast = resampled_auroc(familiar, foreign, inside, outside)
    for value, count_in, count_out in zip(fast, inside, outside, strict=True):
        oracle = auroc(familiar.repeat_interleave(count_in.long()), foreign.repeat_interleave(count_out.long()))
        assert float(value) == pytest.approx(float(oracle), abs=1e-6)


def test_counts_are_resamples_of_each_stratum(monkeypatch):
    monkeypatch.setattr(bootstrap_module, "BLOCK_ELEMENTS", 70)
    blocks = list(resample_counts((10, 4), 23, level=0.9, generator=torch.Generator().manual_seed(0)))
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 3]
    counts = torch.cat(blocks)
    assert bool((counts[:, :10].sum(1) == 10).all())
    assert bool((counts[:, 10:].sum(1) == 4).all())
    assert len(counts.unique(dim=0)) > 20


def test_interval_is_the_percentile_of_the_resamples_and_repeats_under_its_seed():
    probs, labels = predictions()
    metrics = classification_metrics().values()
    first = bootstrap_metrics(metrics, probs, labels, resamples=200, seed=7)
    assert first == bootstrap_metrics(metrics, probs, labels, resamples=200, seed=7)
    assert first["nll"] != bootstrap_metrics(metrics, probs, labels, resamples=200, seed=8)["nll"]
    generator = torch.Generator().manual_seed(7)
    counts = torch.cat(list(resample_counts(len(labels), 200, level=0.95, generator=generator)))
    nll = -probs.double()[torch.arange(len(labels)), labels].log()
    low, high = (counts @ nll / len(labels)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (first["nll"].low, first["nll"].high) == pytest.approx((low, high), rel=1e-6)
    assert first["nll"].value == pytest.approx(float(nll.mean()), rel=1e-6)


def test_paired_difference():
    probs, labels = predictions(400, seed=2)
    sharper = (1.02 * probs.log()).softmax(-1)
    nothing = paired_difference(probs, probs, labels, "ece", resamples=100)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    difference = paired_difference(sharper, probs, labels, "nll")
    reverse = paired_difference(probs, sharper, labels, "nll")
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx(
        (-difference.value, -difference.high, -difference.low), abs=1e-9
    )
    # sharper is worse by little: pairing shows it, while the single intervals overlap widely
    assert difference.low > 0
    metric = classification_metrics()["nll"]
    alone = [bootstrap_metrics([metric], p, labels)["nll"] for p in (sharper, probs)]
    assert alone[0].low < alone[1].high
    assert difference.high - difference.low < 0.2 * (alone[0].high - alone[0].low)


def test_a_report_row_is_fast():
    probs, labels = predictions(600, seed=9)
    scores = torch.randn(600, generator=torch.Generator().manual_seed(1)), torch.randn(600)
    start = time.perf_counter()
    bootstrap_metrics(classification_metrics().values(), probs, labels, resamples=1000)
    for _ in range(3):
        bootstrap_detection(*scores, resamples=1000)
    assert time.perf_counter() - start < 10  # about half a second; a loop of calls takes a minute


def test_bad_input():
    probs, labels = predictions()
    with pytest.raises(ValueError, match="resamples: got 39, expected at least 40"):
        bootstrap_metrics(classification_metrics().values(), probs, labels, resamples=39)
    with pytest.raises(ValueError, match="level: got 95"):
        paired_difference(probs, probs, labels, level=95)
    with pytest.raises(ValueError, match="Did you mean 'brier'"):
        paired_difference(probs, probs, labels, "bryer")
    with pytest.raises(ValueError, match="second: got labels of shape"):
        paired_difference(probs, probs[:-1], labels)


def test_undefined_interval_round_trip():
    interval = Interval.undefined("undefined for a single draw")
    again = Interval.from_dict(interval.to_dict())
    assert math.isnan(again.value)
    assert again.note == interval.note
    assert not again.defined
    assert Interval.from_dict(Interval(0.5, 0.4, 0.6).to_dict()) == Interval(0.5, 0.4, 0.6)
