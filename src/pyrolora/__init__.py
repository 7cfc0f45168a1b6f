"""Bayesian low-rank adapters for transformers, written as Pyro programs."""

from pyrolora.guides import BLoB, FullCovariance, LowRank, MeanField, Point, build_guide
from pyrolora.inference.engine import Engine, StepStats
from pyrolora.inference.evaluation import Report, evaluate
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import Predictive
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import Adapter, LastLayer, LoRA, PoLAR
from pyrolora.models.backbones import Backbone, load_backbone
from pyrolora.models.priors import Flat, learned
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site
from pyrolora.models.tasks import task

__version__ = "0.1.0"

__all__ = [
    "MAP",
    "SVI",
    "Adapter",
    "BLoB",
    "Backbone",
    "BayesianModel",
    "Engine",
    "Flat",
    "FullCovariance",
    "Laplace",
    "LaplacePosterior",
    "LastLayer",
    "LoRA",
    "LowRank",
    "MeanField",
    "PoLAR",
    "Point",
    "Posterior",
    "Predictive",
    "Report",
    "Site",
    "StepStats",
    "build_guide",
    "evaluate",
    "learned",
    "load_backbone",
    "task",
]
