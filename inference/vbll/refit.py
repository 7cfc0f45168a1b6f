"""A last layer's posterior fitted to convergence on cached features: seconds, no network."""

import copy
import logging
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrolora.guides.base import Factor
from pyrolora.guides.block_covariance import BlockCovarianceFactor
from pyrolora.guides.class_contrasts import ClassContrastsFactor
from pyrolora.guides.low_rank_precision import LowRankPrecisionFactor
from pyrolora.guides.vbll import LogitMoments, logit_moments
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.vbll.contrasts import ContrastRows
from pyrolora.inference.vbll.natural import COMMON, GaussianRows, Rows, Whitened, optimum, rows_at_prior
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.randomness import seeded

logger = logging.getLogger(__name__)

# rounds of fit and prior update, and the relative change of the scale at which they stop
SCALE_ROUNDS, SCALE_TOLERANCE = 20, 0.01
LBFGS_STEPS = 300
# natural-gradient steps over contrasts, which no L-BFGS follows
CONTRAST_STEPS = 300


def fit_head(head: LastLayerHead, factor: Factor, data: HeadData, objective: Objective) -> float:
    """Put a factor of ``head.weight`` at the optimum of an objective, and a learned prior scale at its own.

    `BlockCovariance`, and `LowRankPrecision` with a rank of at least the data's span, hold the optimum of every factorised
    posterior, and `ClassContrasts` its own, which natural-gradient steps find; other families go on from there by L-BFGS on
    their own parameters.

    Args:
        head: the last layer.
        factor: its posterior; changed in place.
        data: the training set.
        objective: what to maximise.

    Returns:
        Negative ELBO (or its bound) in nats.

    Raises:
        ValueError: a prior that is no isotropic Normal or learns several scales, or a family without closed-form logit
            moments.
    """
    prior, loss = head.model.prior, 0.0
    if HEAD in prior.learned_sites and prior.scales[HEAD].dim():
        raise ValueError(
            f"The refit of head.weight finds one prior scale, and {prior.scales[HEAD].numel()} are declared. Leave per= out "
            "of learned(...) there, or fit the last layer with SVI."
        )
    for _ in range(SCALE_ROUNDS):
        loss = _fit_once(head, factor, data, objective)
        if HEAD not in prior.learned_sites:
            break
        scale = prior.scales[HEAD]
        before = float(scale)
        prior.update_scales({HEAD: factor.second_moment().mean().detach()}, progress=1.0)
        if abs(float(scale) / before - 1) < SCALE_TOLERANCE:
            break
    return loss


def _fit_once(head: LastLayerHead, factor: Factor, data: HeadData, objective: Objective) -> float:
    white = Whitened.of(data, *head.normal_prior())
    if isinstance(factor, ClassContrastsFactor):
        start = ContrastRows.at_prior(white)
        rows, loss = optimum(data, white, head.complete, objective, steps=CONTRAST_STEPS, start=start)
    else:
        rows, loss = optimum(data, white, head.complete, objective, start=rows_at_prior(head, white))
    if not place(factor, white, rows):
        loss = polish(head, factor, data, objective)
    return loss


def refine_by_laplace(head: LastLayerHead, factor: Factor, data: HeadData) -> None:
    """Keep a posterior's mean and replace its covariance by Laplace's, class by class.

    Class k gets the inverse of its own block of the Hessian, ``(prior precision + sum_n p_nk (1 - p_nk) x x')^(-1)``. The
    diagonal blocks of the inverse of the whole Hessian are no substitute: softmax's shift direction makes them huge, and
    classes taken as independent then overstate differences of logits several times.

    Source: Kristiadi, Hein and Hennig, "Being Bayesian, even just a bit, fixes overconfidence in ReLU networks", 2020.

    Raises:
        ValueError: a family that cannot hold these covariances.
    """
    white = Whitened.of(data, *head.normal_prior())
    mean = factor.mean().detach().double()
    probs = head.complete(_plain(data.inputs @ mean.mT), data.offset).mean.softmax(-1)
    probs = probs[:, -mean.shape[0] :]
    whitened = (mean - white.loc) @ white.basis / white.scale
    rows = GaussianRows(whitened, data.weight * probs * (1 - probs))
    if not place(factor, white, rows, keep_mean=True):
        raise ValueError(
            f"A {factor.family.__class__.__name__} posterior cannot hold Laplace's covariance of each class. Use "
            "BlockCovariance(), or LowRankPrecision(rank=...) with a rank of at least the number of training examples."
        )


def _plain(mean: Tensor) -> LogitMoments:
    return LogitMoments(mean, torch.zeros_like(mean))


@torch.no_grad()
def place(factor: Factor, white: Whitened, rows: Rows, keep_mean: bool = False) -> bool:
    """Write whitened Normals into a factor, as nearly as its family can hold them.

    Args:
        factor: changed in place.
        white: the coordinates.
        rows: the Normals.
        keep_mean: leave the factor's mean as it is.

    Returns:
        Whether the family holds them exactly.
    """
    if not keep_mean and hasattr(factor, "loc"):
        loc: Any = factor.loc
        loc.copy_(white.loc + white.scale * rows.mean @ white.basis.mT)
    if isinstance(factor, BlockCovarianceFactor):
        roots = rows.roots(white.inputs)
        span = torch.cholesky_inverse(roots) - torch.eye(roots.shape[-1]).to(roots)
        covariance = white.basis @ span @ white.basis.mT + torch.eye(len(white.basis)).to(roots)
        factor.set_scale_tril(white.scale * torch.linalg.cholesky(covariance))
        if isinstance(factor, ClassContrastsFactor):
            # the common part of the classes is as in the prior
            factor.set_shift_scale(white.scale / len(rows.mean) ** 0.5)
        return True
    if isinstance(factor, LowRankPrecisionFactor) and isinstance(rows, GaussianRows):
        weighted = white.inputs.mT @ (rows.curvature.mT[..., None] * white.inputs)
        values, vectors = torch.linalg.eigh(weighted)
        kept = min(factor.factor.shape[-1], values.shape[-1])
        columns = white.basis @ (vectors * values.clamp_min(0).sqrt()[..., None, :])
        left_out = columns[..., : values.shape[-1] - kept].square().sum(-1)
        precision = 1 + left_out
        columns = columns[..., values.shape[-1] - kept :] * precision.rsqrt()[..., None]
        factor.set_precision(precision.log() - 2 * math.log(white.scale), columns)
        return kept == values.shape[-1]
    return False


def polish(
    head: LastLayerHead, factor: Factor, data: HeadData, objective: Objective, steps: int = LBFGS_STEPS
) -> float:
    """Minimise the negative bound over a factor's own parameters by L-BFGS in double precision; returns it in nats."""
    twin: Any = copy.deepcopy(factor).double()
    loc, scale = (value.double() for value in head.normal_prior())
    prior = dist.Normal(loc, scale).to_event(2)
    optimiser = torch.optim.LBFGS(
        twin.parameters(), max_iter=steps, history_size=20, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )
    last = float("inf")

    def closure() -> Tensor:
        nonlocal last
        optimiser.zero_grad()
        with torch.enable_grad(), seeded(COMMON, data.inputs.device):
            loss = negative_bound(head, twin, prior, data, objective)
        loss.backward()
        last = float(loss.detach())
        return loss

    optimiser.step(closure)
    factor.load_state_dict(twin.state_dict())
    return last


def negative_bound(head: LastLayerHead, factor: Factor, prior: Any, data: HeadData, objective: Objective) -> Tensor:
    """``KL - sum_n objective_n`` in nats for one posterior of ``head.weight``."""
    q = factor.distribution()
    moments = head.complete(logit_moments(q, data.inputs), data.offset)
    return kl_divergence(q, prior) - data.weight * objective(moments, data.labels).sum()
