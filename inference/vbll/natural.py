"""The optimum of a factorised Gaussian posterior of a last layer, by damped natural-gradient steps."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.models.randomness import seeded

logger = logging.getLogger(__name__)

# expected log-likelihood of labels under Gaussian logits, such as `Objective`
Likelihood = Callable[[LogitMoments, Tensor], Tensor]
Complete = Callable[[LogitMoments, Tensor], LogitMoments]
# one seed for every evaluation, so that a sampled objective is a smooth function
COMMON = 0
# halvings of a step that does not lower the loss
MOST_HALVINGS = 30


@dataclass(frozen=True)
class Whitened:
    """A last layer in coordinates where the prior is standard Normal and only the span of the data is left.

    A weight row is ``loc + scale * (basis @ u + rest)``; the rest is standard Normal whatever the data say.

    Attributes:
        loc: prior mean, ``(rows, columns)``.
        scale: prior standard deviation of every weight.
        basis: orthonormal columns, ``(columns, span)``.
        inputs: the data's coordinates, ``(examples, span)``.
        offset: logits at the prior mean, ``(examples, rows)`` without the fixed part.
    """

    loc: Tensor
    scale: float
    basis: Tensor
    inputs: Tensor
    offset: Tensor

    @staticmethod
    def of(data: HeadData, loc: Tensor, scale: Tensor) -> "Whitened":
        """Whiten by a prior with one standard deviation for all weights.

        Raises:
            ValueError: several standard deviations, or one that is not positive.
        """
        first = isotropic_scale(scale)
        loc, scaled = loc.to(data.inputs), first * data.inputs
        examples, columns = scaled.shape
        if examples < columns:
            basis, values, _ = torch.linalg.svd(scaled.mT, full_matrices=False)
            basis = basis[:, values > 1e-10 * values[0]]
        else:
            basis = torch.eye(columns).to(scaled)
        return Whitened(loc, first, basis, scaled @ basis, data.inputs @ loc.mT)

    def moments(self, rows: "Rows", features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the rows' products with features, ``(examples, rows)`` each.

        Outside the span of the training features the weights are as the prior has them.

        Shape:
            features ``(examples, columns)``
        """
        scaled = self.scale * features.double()
        inputs = scaled @ self.basis
        outside = scaled.square().sum(-1) - inputs.square().sum(-1)
        roots = rows.roots(self.inputs)
        solved = torch.linalg.solve_triangular(roots, inputs.mT.expand(len(roots), -1, -1), upper=False)
        mean = inputs @ rows.mean.mT + features.double() @ self.loc.mT
        return mean, solved.square().sum(-2).mT + outside.clamp_min(0)[:, None]


def isotropic_scale(scale: Tensor) -> float:
    """The one standard deviation of all weights.

    Raises:
        ValueError: several, or one that is not positive.
    """
    first = float(scale.flatten()[0])
    if not bool((scale == scale.flatten()[0]).all()):
        raise ValueError(
            "The prior of head.weight has several standard deviations; this engine needs one for all weights. Declare "
            "logit_scale(2.0) or dist.Normal(0., 0.1) there."
        )
    if not first > 0:
        raise ValueError(f"The prior scale of head.weight must be positive; got {first}. Try logit_scale(2.0).")
    return first


class Rows(Protocol):
    """Normals over the whitened rows, as `optimum` moves them."""

    @property
    def mean(self) -> Tensor:
        """Mean, ``(rows, span)``."""

    def roots(self, inputs: Tensor) -> Tensor:
        """Lower Cholesky factors of the rows' precisions, ``(rows, span, span)``."""

    def divergence(self, roots: Tensor) -> Tensor:
        """KL to the prior in nats."""

    def moved(self, inputs: Tensor, slope: Tensor, curvature: Tensor, length: float) -> "Rows":
        """A natural-gradient step.

        Args:
            inputs: the data's coordinates, ``(examples, span)``.
            slope: gradient of the objective in the logit means, ``(examples, rows)``.
            curvature: minus twice that in the logit variances.
            length: 1 for a whole step.
        """


@dataclass(frozen=True)
class GaussianRows:
    """Independent Normals over the whitened rows: mean, and data weights that make up the precision.

    Attributes:
        mean: ``(rows, span)``.
        curvature: l in ``precision = I + sum_n l_n x_n x_n'``, ``(examples, rows)``.
    """

    mean: Tensor
    curvature: Tensor

    @classmethod
    def at_prior(cls, white: Whitened) -> Self:
        """What is known before the data."""
        zero, rows = white.inputs.new_zeros, white.loc.shape[0]
        return cls(zero(rows, white.inputs.shape[-1]), zero(len(white.inputs), rows))

    def roots(self, inputs: Tensor) -> Tensor:
        """Lower Cholesky factors of the precisions, ``(rows, span, span)``."""
        span = inputs.shape[-1]
        precision = inputs.mT @ (self.curvature.mT[..., None] * inputs)
        return torch.linalg.cholesky(precision + torch.eye(span).to(inputs))

    def divergence(self, roots: Tensor) -> Tensor:
        """See `Rows.divergence`."""
        return standard_divergence(self.mean, roots)

    def moved(self, inputs: Tensor, slope: Tensor, curvature: Tensor, length: float) -> Self:
        """See `Rows.moved`: the weights towards the curvature, the mean preconditioned by the new precision."""
        moved = type(self)(self.mean, (1 - length) * self.curvature + length * curvature)
        pull = (slope.mT @ inputs - self.mean)[..., None]
        change = torch.cholesky_solve(pull, moved.roots(inputs))[..., 0]
        return type(self)(self.mean + length * change, moved.curvature)


@dataclass(frozen=True)
class ClassRows(GaussianRows):
    """Rows that are all the classes of a softmax: a shift of all of them changes the KL alone, so their means add up to zero.

    A step preconditions each row by its own precision and leaves a shift behind, which only the prior pulls back: hundreds of
    steps where the data weigh more than it. The shift's own optimum is known, so it is taken at once.
    """

    def moved(self, inputs: Tensor, slope: Tensor, curvature: Tensor, length: float) -> Self:
        """See `Rows.moved`."""
        moved = super().moved(inputs, slope, curvature, length)
        return replace(moved, mean=moved.mean - moved.mean.mean(0))


def rows_at_prior(head: LastLayerHead, white: Whitened) -> GaussianRows:
    """Independent rows as in the prior, of the kind that fits a head: with or without a shift of all classes."""
    kind = GaussianRows if head.layer.identified else ClassRows
    return kind.at_prior(white)


@dataclass(frozen=True)
class BlockRows:
    """Independent Normals over the whitened rows with dense precisions, which outlive the batch that they were moved by.

    Attributes:
        mean: ``(rows, span)``.
        precision: ``(rows, span, span)``.
    """

    mean: Tensor
    precision: Tensor

    def roots(self, inputs: Tensor) -> Tensor:
        """See `Rows.roots`."""
        return torch.linalg.cholesky(self.precision)

    def divergence(self, roots: Tensor) -> Tensor:
        """See `Rows.divergence`."""
        return standard_divergence(self.mean, roots)

    def target(self, seen: Tensor) -> Tensor:
        """The precisions at which the gradient vanishes, given those that the data add."""
        return torch.eye(seen.shape[-1]).to(seen) + seen

    def counted(self, rows: Tensor) -> Tensor:
        """The part of a change of the mean that counts."""
        return rows

    def moved(self, inputs: Tensor, slope: Tensor, curvature: Tensor, length: float) -> "BlockRows":
        """See `Rows.moved`: the precision towards its target, the mean preconditioned by the new one."""
        target = self.target(inputs.mT @ (curvature.mT[..., None] * inputs))
        precision = torch.lerp(self.precision, 0.5 * (target + target.mT), length)
        pull = slope.mT @ inputs - self.counted(self.mean)
        change = torch.cholesky_solve(pull[..., None], torch.linalg.cholesky(precision))[..., 0]
        return type(self)(self.mean + length * self.counted(change), precision)


@dataclass(frozen=True)
class _State:
    rows: Any
    roots: Tensor
    loss: float
    slope: Tensor
    curvature: Tensor


def optimum(
    data: HeadData,
    white: Whitened,
    complete: Complete,
    objective: Likelihood,
    *,
    steps: int = 200,
    tolerance: float = 1e-10,
    polish_steps: int = 1000,
    start: Rows | None = None,
) -> tuple[Any, float]:
    """Minimise ``KL - sum_n objective_n`` over Normals of the start's kind; the loss never rises.

    For independent rows a step of length r is ``l <- (1 - r) l + r w`` and ``mean <- mean + r S (X' g - mean)``, with g the
    gradient of the objective in the logit mean and w minus twice that in its variance. For a Gaussian likelihood one full
    step is exact.

    Source: Khan and Rue, "The Bayesian Learning Rule", 2023; Opper and Archambeau, "The variational Gaussian approximation
    revisited", 2009, for the N weights that hold the covariance.

    Args:
        data: the data.
        white: the same in whitened coordinates.
        complete: adds the fixed part of the logits, see `LastLayerHead.complete`.
        objective: what to maximise; ``"mc"`` with common random numbers.
        steps: natural-gradient steps at most.
        tolerance: relative decrease of the loss at which to stop.
        polish_steps: L-BFGS steps at most, where `GaussianRows` have not converged, as under Böhning's bound with a wide
            prior.
        start: where to start, and of which kind, see `rows_at_prior`; `GaussianRows` as in the prior by default.

    Returns:
        The optimum and its loss in nats.
    """
    state = _evaluate(data, white, complete, objective, start or GaussianRows.at_prior(white))
    length, small = 1.0, 0
    taken = 0
    for taken in range(1, steps + 1):  # noqa: B007 - reported below
        for _ in range(MOST_HALVINGS):
            moved = state.rows.moved(white.inputs, state.slope, state.curvature, length)
            tried = _evaluate(data, white, complete, objective, moved)
            if tried.loss <= state.loss:
                break
            length /= 2
        else:
            break
        decrease, state = state.loss - tried.loss, tried
        length = min(1.0, 2 * length)
        small = small + 1 if decrease < tolerance * (1 + abs(state.loss)) else 0
        if small == 3:
            break
    else:
        if polish_steps and isinstance(state.rows, GaussianRows):
            state = _polish(data, white, complete, objective, state, polish_steps, tolerance)
    logger.debug("natural gradient: %d steps, loss %.6f", taken, state.loss)
    return state.rows, state.loss


def _polish(
    data: HeadData,
    white: Whitened,
    complete: Complete,
    objective: Likelihood,
    state: _State,
    steps: int,
    tolerance: float,
) -> _State:
    """L-BFGS over the same means and data weights, the weights in logarithm."""
    mean = state.rows.mean.clone().requires_grad_()
    log_curvature = state.rows.curvature.clamp_min(1e-12).log().requires_grad_()
    optimiser = torch.optim.LBFGS(
        (mean, log_curvature), max_iter=steps, max_eval=2 * steps, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-7, tolerance_change=tolerance,
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        rows = GaussianRows(mean, log_curvature.exp())
        roots = rows.roots(white.inputs)
        solved = torch.linalg.solve_triangular(roots, white.inputs.mT.expand(len(roots), -1, -1), upper=False)
        moments = LogitMoments(white.inputs @ mean.mT + white.offset, solved.square().sum(-2).mT)
        with seeded(COMMON, data.inputs.device):
            likelihood = data.weight * objective(complete(moments, data.offset), data.labels).sum()
        loss = standard_divergence(mean, roots) - likelihood
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    polished = replace(state.rows, mean=mean.detach(), curvature=log_curvature.detach().exp())
    found = _evaluate(data, white, complete, objective, polished)
    return found if found.loss < state.loss else state


def _evaluate(data: HeadData, white: Whitened, complete: Complete, objective: Likelihood, rows: Rows) -> _State:
    roots = rows.roots(white.inputs)
    mean = (white.inputs @ rows.mean.mT + white.offset).requires_grad_()
    solved = torch.linalg.solve_triangular(roots, white.inputs.mT.expand(len(roots), -1, -1), upper=False)
    variance = solved.square().sum(-2).mT.contiguous().requires_grad_()
    with torch.enable_grad(), seeded(COMMON, data.inputs.device):
        likelihood = data.weight * objective(complete(LogitMoments(mean, variance), data.offset), data.labels).sum()
    slope, towards = torch.autograd.grad(likelihood, (mean, variance))
    loss = float(rows.divergence(roots) - likelihood.detach())
    # a bound is concave in the variance's direction of less certainty; sampling may break that by a rounding error
    return _State(rows, roots, loss, slope, (-2 * towards).clamp_min(0))


def standard_divergence(mean: Tensor, roots: Tensor) -> Tensor:
    """KL in nats from Normals with Cholesky factors of precisions to the standard Normal."""
    eye = torch.eye(mean.shape[-1]).to(mean).expand_as(roots)
    trace = torch.linalg.solve_triangular(roots, eye, upper=False).square().sum()
    log_precision = 2 * roots.diagonal(dim1=-2, dim2=-1).log().sum()
    return 0.5 * (mean.square().sum() + trace - mean.numel() + log_precision)
