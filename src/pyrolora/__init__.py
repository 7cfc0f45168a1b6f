"""Bayesian low-rank adapters for transformers, written as Pyro programs."""

from pyrolora.guides import (
    BLoB,
    BlockCovariance,
    ClassContrasts,
    FullCovariance,
    LowRank,
    LowRankPrecision,
    MatrixNormal,
    MeanField,
    Point,
    StiefelNormal,
    build_guide,
)
from pyrolora.inference.engine import Engine, StepStats
from pyrolora.inference.evaluation import Report, evaluate
from pyrolora.inference.evaluation.gold import compare_to_gold
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.map import MAP
from pyrolora.inference.merging import merge
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import Predictive
from pyrolora.inference.pruning import prune_ranks, rank_reports
from pyrolora.inference.released import ReleasedBLoB
from pyrolora.inference.retaining import QualityRetaining
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import (
    S2FT,
    Adapter,
    CorDA,
    FullRank,
    ItemProjector,
    LabelLoRA,
    LastLayer,
    LoRA,
    LoRAPool,
    MixtureLoRA,
    MoEfiedLoRA,
    PiSSA,
    PoLAR,
    QPiSSA,
)
from pyrolora.models.backbones import Backbone
from pyrolora.models.covariance import Covariance
from pyrolora.models.loading import load_backbone
from pyrolora.models.moments import SecondMoments, second_moments
from pyrolora.models.prior_declarations import Flat, Relative, learned, logit_scale
from pyrolora.models.program import BayesianModel
from pyrolora.models.serving import Served, merged
from pyrolora.models.sites import Site
from pyrolora.models.tasks import task
from pyrolora.models.vision import VisionBackbone

__version__ = "0.1.0"

__all__ = [
    "MAP",
    "NUTS",
    "S2FT",
    "SVI",
    "VBLL",
    "Adapter",
    "BLoB",
    "Backbone",
    "BayesianModel",
    "BlockCovariance",
    "BlockSchedule",
    "ClassContrasts",
    "CorDA",
    "Covariance",
    "Engine",
    "FeatureCache",
    "Flat",
    "FullCovariance",
    "FullRank",
    "ItemProjector",
    "LabelLoRA",
    "Laplace",
    "LaplacePosterior",
    "LastLayer",
    "LoRA",
    "LoRAPool",
    "LowRank",
    "LowRankPrecision",
    "MatrixNormal",
    "MeanField",
    "MixtureLoRA",
    "MoEfiedLoRA",
    "PiSSA",
    "PoLAR",
    "Point",
    "Posterior",
    "Predictive",
    "QPiSSA",
    "QualityRetaining",
    "Relative",
    "ReleasedBLoB",
    "Report",
    "SecondMoments",
    "Served",
    "Site",
    "StepStats",
    "StiefelNormal",
    "VisionBackbone",
    "build_guide",
    "compare_to_gold",
    "evaluate",
    "learned",
    "load_backbone",
    "logit_scale",
    "merge",
    "merged",
    "prune_ranks",
    "rank_reports",
    "second_moments",
    "task",
]
