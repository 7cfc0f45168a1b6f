"""The shapes a posterior over adapter sites may take, one family a file."""

from pyrolora.guides.base import Factor, Family, Guide, GuideSpecification
from pyrolora.guides.blob import BLoB
from pyrolora.guides.block_covariance import BlockCovariance
from pyrolora.guides.build import build_guide
from pyrolora.guides.class_contrasts import ClassContrasts
from pyrolora.guides.dirichlet import Dirichlet
from pyrolora.guides.empirical import Empirical
from pyrolora.guides.full_covariance import FullCovariance
from pyrolora.guides.kronecker import KroneckerNormal
from pyrolora.guides.low_rank import LowRank, LowRankNormal
from pyrolora.guides.low_rank_precision import LowRankPrecision
from pyrolora.guides.matrix_normal import MatrixNormal
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.point import Point
from pyrolora.guides.stiefel import StiefelNormal
from pyrolora.guides.vbll import LogitMoments, logit_moments

__all__ = [
    "BLoB",
    "BlockCovariance",
    "ClassContrasts",
    "Dirichlet",
    "Empirical",
    "Factor",
    "Family",
    "FullCovariance",
    "Guide",
    "GuideSpecification",
    "KroneckerNormal",
    "LogitMoments",
    "LowRank",
    "LowRankNormal",
    "LowRankPrecision",
    "MatrixNormal",
    "MeanField",
    "Point",
    "StiefelNormal",
    "build_guide",
    "kl_to_factorised_normal",
    "logit_moments",
]
