"""Classification metrics of averaged predictions, and the registry that a report reads its columns from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from pyrolora.inference.evaluation.calibration import (
    classwise_ece,
    ece_equal_mass,
    ece_equal_width,
    maximum_calibration_error,
    resampled_classwise_ece,
    resampled_ece_equal_mass,
    resampled_ece_equal_width,
    resampled_maximum_calibration_error,
)
from pyrolora.inference.evaluation.selective import (
    area_under_risk_coverage,
    coverage_at_risk,
    resampled_area,
    resampled_coverage,
)
from pyrolora.inference.evaluation.validation import check_predictions
from pyrolora.models.naming import nearest

CALIBRATION = "Calibration of every class, and in the worst bin"
SELECTIVE = "Selective prediction (most confident first)"


@dataclass(frozen=True)
class Metric:
    """One column of a report.

    ``classification_metrics(n_bins=15)["ece"].function(probs, labels)``

    Attributes:
        name: key in a report's rows.
        title: what a table prints, with the number of bins where there are any.
        higher_is_better: which end of the column is the good one.
        function: ``(probs (examples, classes), labels (examples,)) -> scalar``.
        resampled: ``(probs, labels, counts (resamples, examples)) -> (resamples,)``, the same metric of every
            resample.
        interval_digits: decimals that its interval is printed with.
        section: heading of the table that it stands in.
    """

    name: str
    title: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    resampled: Callable[[Tensor, Tensor, Tensor], Tensor]
    interval_digits: int = 2
    section: str = "Test items"


def accuracy(probs: Tensor, labels: Tensor) -> Tensor:
    """Share of examples whose most probable class is the true one.

    ``accuracy(predictive.mean_probs, predictive.labels)``

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar in 0..1.

    Raises:
        ValueError: invalid probabilities or labels.
    """
    probs, labels = check_predictions(probs, labels)
    return multiclass_accuracy(probs, labels, num_classes=probs.shape[1], average="micro").double()


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log probability of the true class, in nats.

    ``negative_log_likelihood(predictive.mean_probs, predictive.labels)``

    Give the mean probabilities: the log of the mean over draws is the predictive density, the mean of the
    logs is not. A probability that underflowed to zero counts as the smallest normal number of its type,
    which is 87.3 nats in float32.

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar, NLL in nats per
            example.

    Raises:
        ValueError: invalid probabilities or labels.
    """
    return _nll_of_examples(*check_predictions(probs, labels)).mean()


def brier_score(probs: Tensor, labels: Tensor) -> Tensor:
    """Squared distance between the probabilities and the one-hot truth, summed over classes: 0 (best) to 2.

    ``brier_score(predictive.mean_probs, predictive.labels)``

    Args:
        probs: class probabilities, already averaged over draws.
        labels: true classes.

    Shape:
        probs: ``(examples, classes)``. labels: ``(examples,)``. Returns a float64 scalar.

    Raises:
        ValueError: invalid probabilities or labels.

    Brier 1950, "Verification of forecasts expressed in terms of probability" (not divided by the number of
    classes).
    """
    return _brier_of_examples(*check_predictions(probs, labels)).mean()


def classification_metrics(n_bins: int = 15) -> dict[str, Metric]:
    """Return every metric of a report by name, in the order of the report's columns.

    ``classification_metrics(n_bins=10)["ece_mass"].title  # 'ECE mass (10 bins)'``

    Args:
        n_bins: number of bins of the calibration errors.

    Returns:
        name -> `Metric`.
    """
    metrics = [
        Metric("accuracy", "Accuracy", True, accuracy, partial(_resampled_mean, _correct_of_examples)),
        Metric("nll", "NLL (nats)", False, negative_log_likelihood, partial(_resampled_mean, _nll_of_examples)),
        Metric("brier", "Brier (0..2)", False, brier_score, partial(_resampled_mean, _brier_of_examples)),
        Metric(
            "ece",
            f"ECE ({n_bins} bins)",
            False,
            partial(ece_equal_width, n_bins=n_bins),
            partial(resampled_ece_equal_width, n_bins=n_bins),
            interval_digits=3,
        ),
        Metric(
            "ece_mass",
            f"ECE mass ({n_bins} bins)",
            False,
            partial(ece_equal_mass, n_bins=n_bins),
            partial(resampled_ece_equal_mass, n_bins=n_bins),
            interval_digits=3,
        ),
        Metric(
            "ece_classwise",
            f"Classwise ECE ({n_bins} bins)",
            False,
            partial(classwise_ece, n_bins=n_bins),
            partial(resampled_classwise_ece, n_bins=n_bins),
            interval_digits=3,
            section=CALIBRATION,
        ),
        Metric(
            "ece_adaptive",
            f"Adaptive ECE ({n_bins} bins)",
            False,
            partial(classwise_ece, n_bins=n_bins, strategy="mass"),
            partial(resampled_classwise_ece, n_bins=n_bins, strategy="mass"),
            interval_digits=3,
            section=CALIBRATION,
        ),
        Metric(
            "mce",
            f"MCE ({n_bins} bins)",
            False,
            partial(maximum_calibration_error, n_bins=n_bins),
            partial(resampled_maximum_calibration_error, n_bins=n_bins),
            section=CALIBRATION,
        ),
        Metric("aurc", "AURC", False, area_under_risk_coverage, resampled_area, interval_digits=3, section=SELECTIVE),
        Metric(
            "coverage_at_5",
            "Coverage at 5% risk",
            True,
            coverage_at_risk,
            resampled_coverage,
            section=SELECTIVE,
        ),
    ]
    return {metric.name: metric for metric in metrics}


def find_metric(name: str, n_bins: int = 15) -> Metric:
    """Return one metric by name.

    ``find_metric("nll").function(probs, labels)``

    Args:
        name: a key of `classification_metrics`.
        n_bins: number of bins of the calibration errors.

    Raises:
        ValueError: no such metric; the message offers the nearest name.
    """
    metrics = classification_metrics(n_bins)
    if name not in metrics:
        raise ValueError(
            f"metric: got {name!r}, expected one of {', '.join(map(repr, metrics))}. "
            f"Did you mean {nearest(name, metrics)!r}?"
        )
    return metrics[name]


def _correct_of_examples(probs: Tensor, labels: Tensor) -> Tensor:
    return (probs.argmax(1) == labels).double()


def _nll_of_examples(probs: Tensor, labels: Tensor) -> Tensor:
    true_class = probs.gather(1, labels[:, None]).squeeze(1)
    return -true_class.clamp(min=torch.finfo(probs.dtype).tiny).double().log()


def _brier_of_examples(probs: Tensor, labels: Tensor) -> Tensor:
    truth = torch.nn.functional.one_hot(labels, probs.shape[1])
    return (probs.double() - truth).square().sum(1)


def _resampled_mean(
    of_examples: Callable[[Tensor, Tensor], Tensor], probs: Tensor, labels: Tensor, counts: Tensor
) -> Tensor:
    return counts @ of_examples(probs, labels) / counts.sum(1)
