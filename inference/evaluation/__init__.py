"""Metrics, plots and reports that compare posteriors on held-out data."""

from pyrolora.inference.evaluation.aggregate import Row, Summary
from pyrolora.inference.evaluation.bootstrap import (
    Interval,
    bootstrap_detection,
    bootstrap_mean,
    bootstrap_metrics,
    paired_difference,
)
from pyrolora.inference.evaluation.calibration import (
    CalibrationTable,
    calibration_curve,
    classwise_ece,
    ece_equal_mass,
    ece_equal_width,
    maximum_calibration_error,
)
from pyrolora.inference.evaluation.conformal import ConformalSets, SetQuality, conformalise
from pyrolora.inference.evaluation.cost import Cost, measure_cost
from pyrolora.inference.evaluation.detection import auroc, average_precision, false_positive_rate
from pyrolora.inference.evaluation.disagreement import human_disagreement, rank_correlation
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
    decompose,
    energy_score,
    max_probability_uncertainty,
    mutual_information,
    predictive_entropy,
)
from pyrolora.inference.evaluation.permutation import PermutationTest, paired_permutation_test
from pyrolora.inference.evaluation.plots import reliability_diagram
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.evaluation.selective import (
    RiskCoverage,
    area_under_risk_coverage,
    coverage_at_risk,
    risk_coverage_curve,
)
from pyrolora.inference.evaluation.temperature import TemperatureScaling, fit_temperature, temperature_scaled

__all__ = [
    "OOD_SCORES",
    "CalibrationTable",
    "ConformalSets",
    "Cost",
    "Interval",
    "PermutationTest",
    "Report",
    "RiskCoverage",
    "Row",
    "SetQuality",
    "Summary",
    "TemperatureScaling",
    "Uncertainty",
    "accuracy",
    "area_under_risk_coverage",
    "auroc",
    "average_precision",
    "bootstrap_detection",
    "bootstrap_mean",
    "bootstrap_metrics",
    "brier_score",
    "calibration_curve",
    "classification_metrics",
    "classwise_ece",
    "conformalise",
    "coverage_at_risk",
    "decompose",
    "ece_equal_mass",
    "ece_equal_width",
    "energy_score",
    "evaluate",
    "false_positive_rate",
    "fit_temperature",
    "human_disagreement",
    "max_probability_uncertainty",
    "maximum_calibration_error",
    "measure_cost",
    "mutual_information",
    "negative_log_likelihood",
    "paired_difference",
    "paired_permutation_test",
    "predictive_entropy",
    "rank_correlation",
    "reliability_diagram",
    "risk_coverage_curve",
    "temperature_scaled",
]
