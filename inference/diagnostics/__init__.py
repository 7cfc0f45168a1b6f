"""What a posterior can and cannot be trusted with: tails, simulations, layers, replicated data."""

from pyrolora.inference.diagnostics.cross_validation import LeaveOneOut, compare_loo, loo
from pyrolora.inference.diagnostics.importance import ParetoDiagnosis, pareto_smooth, posterior_khat
from pyrolora.inference.diagnostics.layers import layer_summary
from pyrolora.inference.diagnostics.plots import rank_diagram
from pyrolora.inference.diagnostics.predictive_checks import PredictiveCheck, posterior_predictive_check
from pyrolora.inference.diagnostics.simulation import (
    SimulationBasedCalibration,
    calibrate_engine,
    simulation_based_calibration,
)
from pyrolora.inference.spectrum import ChangeSpectrum, change_spectra, effective_rank, stable_rank

__all__ = [
    "ChangeSpectrum",
    "LeaveOneOut",
    "ParetoDiagnosis",
    "PredictiveCheck",
    "SimulationBasedCalibration",
    "calibrate_engine",
    "change_spectra",
    "compare_loo",
    "effective_rank",
    "layer_summary",
    "loo",
    "pareto_smooth",
    "posterior_khat",
    "posterior_predictive_check",
    "rank_diagram",
    "simulation_based_calibration",
    "stable_rank",
]
