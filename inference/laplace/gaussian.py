"""From curvature and prior precision to a Pyro guide."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrolora.guides import Guide, build_guide
from pyrolora.guides.base import Family
from pyrolora.guides.full_covariance import FullCovariance, FullCovarianceFactor
from pyrolora.guides.kronecker import KroneckerFactor, KroneckerNormal
from pyrolora.guides.mean_field import MeanField, NormalFactor
from pyrolora.guides.point import Point
from pyrolora.inference.laplace.precision import NormalPrior
from pyrolora.inference.laplace.structures import Dense, Diagonal, Kronecker, Structure
from pyrolora.models.program import BayesianModel


def normal_guide(
    model: BayesianModel,
    mean: Mapping[str, Tensor],
    structures: Mapping[str, Structure],
    priors: Mapping[str, NormalPrior],
    temperature: float,
) -> Guide:
    """The posterior as a guide: Normal at the sites with curvature, a point elsewhere.

    Args:
        model: the model.
        mean: site name -> estimate, for all sites.
        structures: site name -> decomposed curvature.
        priors: site name -> prior.
        temperature: factor on the covariance.
    """
    families = {name: _family(structures[name]) if name in structures else Point() for name in model.sites}
    guide = build_guide(families, model, start=mean)
    for name, factor in guide.items():
        if name not in structures:
            continue
        structure, precision = structures[name], priors[name].precision
        if isinstance(structure, Diagonal) and isinstance(factor, NormalFactor):
            variance = temperature / (structure.total + precision)
            factor.log_scale.data.copy_(0.5 * variance.log())
        elif isinstance(structure, Dense) and isinstance(factor, FullCovarianceFactor):
            variance = temperature / (structure.values + precision.flatten())
            # the QR of a square root of the covariance gives its Cholesky factor without squaring the condition number
            upper = torch.linalg.qr((structure.basis * variance.sqrt()).double().mT, mode="r").R
            lower = upper.mT * upper.diagonal().sign()
            factor.set_scale_tril(lower.to(factor.loc))
        elif isinstance(structure, Kronecker) and isinstance(factor, KroneckerFactor):
            by_entry = precision.reshape(-1, 1, 1)
            scale = (temperature / (structure.products_of_eigenvalues() + by_entry)).sqrt()
            rest = (temperature / by_entry).sqrt().expand_as(factor.log_rest)
            factor.set_basis(structure.out_basis, structure.in_basis, scale, rest)
    return guide


def _family(structure: Structure) -> Family:
    if isinstance(structure, Dense):
        return FullCovariance()
    if isinstance(structure, Kronecker):
        return KroneckerNormal(rank=structure.rank)
    return MeanField()
