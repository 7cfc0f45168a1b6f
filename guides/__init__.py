"""The shapes a posterior over adapter sites may take, one family a file."""

from pyrolora.guides.base import Factor, Family, Guide, GuideSpecification
from pyrolora.guides.blob import BLoB
from pyrolora.guides.build import build_guide
from pyrolora.guides.full_covariance import FullCovariance
from pyrolora.guides.kronecker import KroneckerNormal
from pyrolora.guides.low_rank import LowRank, LowRankNormal
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.normal_kl import kl_to_factorised_normal
from pyrolora.guides.point import Point

__all__ = [
    "BLoB",
    "Factor",
    "Family",
    "FullCovariance",
    "Guide",
    "GuideSpecification",
    "KroneckerNormal",
    "LowRank",
    "LowRankNormal",
    "MeanField",
    "Point",
    "build_guide",
    "kl_to_factorised_normal",
]
