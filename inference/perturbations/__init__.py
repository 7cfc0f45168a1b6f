"""Worst cases close by: perturbed pixels and perturbed weights."""

from pyrolora.inference.perturbations.objectives import cross_entropy_objective, divergence, divergence_objective
from pyrolora.inference.perturbations.pixels import PGD, PyramidPGD
from pyrolora.inference.perturbations.weights import MODES, PerturbedSites, WeightPerturbation

__all__ = [
    "MODES",
    "PGD",
    "PerturbedSites",
    "PyramidPGD",
    "WeightPerturbation",
    "cross_entropy_objective",
    "divergence",
    "divergence_objective",
]
