"""Metrics, plots and reports that compare posteriors on held-out data."""

from pyrolora.inference.evaluation.aggregate import Row, Summary
from pyrolora.inference.evaluation.bootstrap import (
    Interval,
    bootstrap_auroc,
    bootstrap_metrics,
    paired_difference,
)
from pyrolora.inference.evaluation.calibration import (
    CalibrationTable,
    calibration_curve,
    ece_equal_mass,
    ece_equal_width,
)
from pyrolora.inference.evaluation.cost import Cost, measure_cost
from pyrolora.inference.evaluation.harness import evaluate
from pyrolora.inference.evaluation.metrics import (
    accuracy,
    brier_score,
    classification_metrics,
    negative_log_likelihood,
)
from pyrolora.inference.evaluation.ood import (
    OOD_SCORES,
    Uncertainty,
    auroc,
    decompose,
    max_probability_uncertainty,
    mutual_information,
    predictive_entropy,
)
from pyrolora.inference.evaluation.plots import reliability_diagram
from pyrolora.inference.evaluation.report import Report

__all__ = [
    "OOD_SCORES",
    "CalibrationTable",
    "Cost",
    "Interval",
    "Report",
    "Row",
    "Summary",
    "Uncertainty",
    "accuracy",
    "auroc",
    "bootstrap_auroc",
    "bootstrap_metrics",
    "brier_score",
    "calibration_curve",
    "classification_metrics",
    "decompose",
    "ece_equal_mass",
    "ece_equal_width",
    "evaluate",
    "max_probability_uncertainty",
    "measure_cost",
    "mutual_information",
    "negative_log_likelihood",
    "paired_difference",
    "predictive_entropy",
    "reliability_diagram",
]
