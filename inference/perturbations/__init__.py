"""Worst cases close by: perturbed pixels and perturbed weights."""

from pyrolora.inference.perturbations.objectives import (
    DIRECTIONS,
    cross_entropy_objective,
    divergence,
    divergence_objective,
)
from pyrolora.inference.perturbations.pixels import PGD, PyramidPGD
from pyrolora.inference.perturbations.weights import MODES, PerturbedSites, WeightPerturbation

# name in a declaration -> what makes the object
ATTACKS = {"PGD": PGD, "PyramidPGD": PyramidPGD}
PERTURBATIONS = {"WeightPerturbation": WeightPerturbation}

__all__ = [
    "ATTACKS",
    "DIRECTIONS",
    "MODES",
    "PERTURBATIONS",
    "PGD",
    "PerturbedSites",
    "PyramidPGD",
    "WeightPerturbation",
    "cross_entropy_objective",
    "divergence",
    "divergence_objective",
]
