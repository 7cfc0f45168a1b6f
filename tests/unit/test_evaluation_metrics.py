"""Oracles: torchmetrics where it has the metric, otherwise float64 loops written from the definition."""

import math

import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError, MulticlassAccuracy, MulticlassCalibrationError

from pyrolora.inference.evaluation import (
    accuracy,
    brier_score,
    calibration_curve,
    classification_metrics,
    classwise_ece,
    ece_equal_mass,
    ece_equal_width,
    maximum_calibration_error,
    negative_log_likelihood,
)
from pyrolora.inference.evaluation.calibration import CalibrationTable
from pyrolora.inference.evaluation.metrics import find_metric

CASES = ["random", "binary", "saturated", "tied", "one_class", "single"]


def predictions(case, examples=203):
    generator = torch.Generator().manual_seed(CASES.index(case))
    classes = 2 if case == "binary" else 5
    examples = 1 if case == "single" else examples
    logits = 2 * torch.randn(examples, classes, generator=generator)
    if case == "saturated":
        logits[:60] *= 200  # softmax gives exact ones and zeros
    probs = logits.softmax(-1)
    if case == "tied":
        probs = probs[torch.arange(examples) // 9]
    labels = torch.randint(classes, (examples,), generator=generator)
    if case == "one_class":
        labels = torch.zeros(examples, dtype=torch.int64)
    return probs, labels


def brute_force_equal_mass(probs, labels, n_bins):
    confidences = [max(row) for row in probs.double().tolist()]
    correct = [float(row.index(max(row)) == label) for row, label in zip(probs.tolist(), labels.tolist(), strict=True)]
    gaps = [0.0] * n_bins
    for confidence, right in zip(confidences, correct, strict=True):
        place = sum(other < confidence for other in confidences)
        gaps[place * n_bins // len(confidences)] += right - confidence
    return sum(map(abs, gaps)) / len(confidences)


def brute_force_classwise(probs, labels, n_bins, strategy):
    """Class by class, example by example; equal probabilities follow the first of their group into a bin of equal mass."""
    errors = []
    for k in range(probs.shape[1]):
        column = probs[:, k]
        edges = torch.linspace(0, 1, n_bins + 1)
        gaps = [0.0] * (n_bins + 1)
        for value, label in zip(column, labels.tolist(), strict=True):
            if strategy == "width":
                place = sum(bool(value >= edge) for edge in edges) - 1
            else:
                place = int((column < value).sum()) * n_bins // len(column)
            gaps[place] += float(label == k) - float(value)
        errors.append(sum(map(abs, gaps)) / len(column))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("strategy", ["width", "mass"])
@pytest.mark.parametrize("case", CASES)
def test_classwise_error_equals_loops_from_the_definition(case, strategy):
    probs, labels = predictions(case)
    for n_bins in (1, 15):
        expected = brute_force_classwise(probs, labels, n_bins, strategy)
        assert float(classwise_ece(probs, labels, n_bins, strategy)) == pytest.approx(expected, abs=1e-6)


def test_two_classes_have_the_classwise_error_of_either():
    probs, labels = predictions("binary")
    one = BinaryCalibrationError(n_bins=1, norm="l1")(probs[:, 1], labels)
    assert float(classwise_ece(probs, labels, 1)) == pytest.approx(float(one), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_maximum_calibration_error_equals_torchmetrics(case):
    probs, labels = predictions(case)
    for n_bins in (1, 10, 15):
        oracle = MulticlassCalibrationError(probs.shape[1], n_bins=n_bins, norm="max")(probs, labels)
        assert float(maximum_calibration_error(probs, labels, n_bins)) == pytest.approx(float(oracle), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_accuracy_and_ece_equal_torchmetrics(case):
    probs, labels = predictions(case)
    classes = probs.shape[1]
    assert float(accuracy(probs, labels)) == pytest.approx(
        float(MulticlassAccuracy(classes, average="micro")(probs, labels)), abs=1e-6
    )
    for n_bins in (1, 10, 15):
        oracle = MulticlassCalibrationError(classes, n_bins=n_bins, norm="l1")(probs, labels)
        assert float(ece_equal_width(probs, labels, n_bins)) == pytest.approx(float(oracle), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_brier_and_nll_equal_loops(case):
    probs, labels = predictions(case)
    rows = list(zip(probs.double().tolist(), labels.tolist(), strict=True))
    brier = sum(sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for row, label in rows) / len(rows)
    nll = sum(-math.log(max(row[label], torch.finfo(torch.float32).tiny)) for row, label in rows) / len(rows)
    assert float(brier_score(probs, labels)) == pytest.approx(brier, abs=1e-9)
    assert float(negative_log_likelihood(probs, labels)) == pytest.approx(nll, rel=1e-9)


@pytest.mark.parametrize("n_bins", [1, 7, 15, 300])
@pytest.mark.parametrize("case", CASES)
def test_equal_mass_ece_equals_brute_force(case, n_bins):
    probs, labels = predictions(case)
    assert float(ece_equal_mass(probs, labels, n_bins)) == pytest.approx(
        brute_force_equal_mass(probs, labels, n_bins), abs=1e-7
    )


def test_equal_mass_ece_does_not_depend_on_row_order():
    probs, labels = predictions("tied")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
    assert ece_equal_mass(probs, labels) == pytest.approx(float(ece_equal_mass(probs[order], labels[order])), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4, 11])
def test_uniform_prediction_closed_forms(classes):
    probs = torch.full((30, classes), 1 / classes)
    labels = torch.arange(30) % classes
    assert float(negative_log_likelihood(probs, labels)) == pytest.approx(math.log(classes), rel=1e-6)
    assert float(brier_score(probs, labels)) == pytest.approx(1 - 1 / classes, rel=1e-6)


def test_perfect_and_worst_prediction():
    probs = torch.eye(3)
    right, wrong = torch.arange(3), (torch.arange(3) + 1) % 3
    perfect = {name: float(metric.function(probs, right)) for name, metric in classification_metrics().items()}
    assert perfect == {name: float(name in ("accuracy", "coverage_at_5")) for name in perfect}
    assert float(brier_score(probs, wrong)) == 2
    assert float(ece_equal_width(probs, wrong)) == 1
    assert float(negative_log_likelihood(probs, wrong)) == pytest.approx(87.34, abs=0.01)


@pytest.mark.parametrize("strategy", ["width", "mass"])
@pytest.mark.parametrize("case", CASES)
def test_calibration_table_is_consistent(case, strategy):
    probs, labels = predictions(case)
    table = calibration_curve(probs, labels, 10, strategy)
    filled = table.count > 0
    assert table.count.sum() == len(labels)
    assert len(table.edges) == 11
    assert bool((table.edges.diff() >= 0).all())
    assert float((table.count * table.accuracy)[filled].sum() / len(labels)) == pytest.approx(
        float(accuracy(probs, labels)), abs=1e-6
    )
    inside = (table.confidence >= table.edges[:-1] - 1e-7) & (table.confidence <= table.edges[1:] + 1e-7)
    assert bool(inside[filled].all())
    if strategy == "mass" and case == "random":
        assert float(table.count.max() - table.count.min()) <= 1
    metric = ece_equal_mass if strategy == "mass" else ece_equal_width
    if case != "saturated" or strategy == "mass":  # torchmetrics keeps a confidence of exactly 1 apart
        assert table.expected_calibration_error == pytest.approx(float(metric(probs, labels, 10)), abs=1e-6)
    again = CalibrationTable.from_dict(table.to_dict())
    assert torch.equal(again.confidence.nan_to_num(-1), table.confidence.nan_to_num(-1))


def test_registry_names_the_bins():
    metrics = classification_metrics(n_bins=10)
    assert list(metrics) == [
        "accuracy", "nll", "brier", "ece", "ece_mass", "ece_classwise", "ece_adaptive", "mce", "aurc", "coverage_at_5",
    ]  # fmt: skip
    assert "10 bins" in metrics["ece"].title
    assert "10 bins" in metrics["ece_mass"].title
    assert [name for name, metric in metrics.items() if metric.higher_is_better] == ["accuracy", "coverage_at_5"]
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        find_metric("acuracy")


def broken(row, values):
    probs = torch.full((6, 3), 1 / 3)
    probs[row] = torch.tensor(values)
    return probs


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (broken(4, [math.nan, 0.5, 0.5]), "row 4 holds NaN"),
        (broken(2, [0.5, 0.5, 0.5]), "row 2 does not sum to one"),
        (broken(1, [-3.0, 2.0, 2.0]), "row 1 leaves .* softmax"),
        (torch.zeros(0, 3), "at least one example"),
        (torch.ones(6, 1), "two classes"),
        (torch.full((2, 6, 3), 1 / 3), "Average the draws"),
    ],
)
def test_bad_probabilities_name_the_row(probs, message):
    for metric in classification_metrics().values():
        with pytest.raises(ValueError, match=message):
            metric.function(probs, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), ValueError, r"shape \(5,\) for 6 rows"),
        (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, "label 3 of row 3"),
        (torch.tensor([0, -1, 2, 0, 0, 0]), ValueError, "label -1 of row 1"),
        (torch.zeros(6), TypeError, "class indices"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        accuracy(torch.full((6, 3), 1 / 3), labels)


@pytest.mark.parametrize("n_bins", [0, -1, 2.5, True])
def test_bad_bins(n_bins):
    probs, labels = predictions("random")
    for call in (ece_equal_width, ece_equal_mass, calibration_curve):
        with pytest.raises(ValueError, match="n_bins"):
            call(probs, labels, n_bins)
    with pytest.raises(ValueError, match="strategy: got 'mas'"):
        calibration_curve(probs, labels, 10, "mas")
