"""Bayesian low-rank adapters for transformers, written as Pyro programs."""

from pyrolora.guides import (
    BLoB,
    BlockCovariance,
    FullCovariance,
    LowRank,
    LowRankPrecision,
    MatrixNormal,
    MeanField,
    Point,
    build_guide,
)
from pyrolora.inference.engine import Engine, StepStats
from pyrolora.inference.evaluation import Report, evaluate
from pyrolora.inference.evaluation.gold import compare_to_gold
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.map import MAP
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import Predictive
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import Adapter, LastLayer, LoRA, PoLAR
from pyrolora.models.backbones import Backbone, load_backbone
from pyrolora.models.priors import Flat, learned, logit_scale
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site
from pyrolora.models.tasks import task

__version__ = "0.1.0"

__all__ = [
    "MAP",
    "NUTS",
    "SVI",
    "VBLL",
    "Adapter",
    "BLoB",
    "Backbone",
    "BayesianModel",
    "BlockCovariance",
    "Engine",
    "FeatureCache",
    "Flat",
    "FullCovariance",
    "Laplace",
    "LaplacePosterior",
    "LastLayer",
    "LoRA",
    "LowRank",
    "LowRankPrecision",
    "MatrixNormal",
    "MeanField",
    "PoLAR",
    "Point",
    "Posterior",
    "Predictive",
    "Report",
    "Site",
    "StepStats",
    "build_guide",
    "compare_to_gold",
    "evaluate",
    "learned",
    "load_backbone",
    "logit_scale",
    "task",
]
