"""Lower bounds and estimates of ``E[log softmax(z)_y]`` for Gaussian logits z: what VBLL training maximises.

Each is the mean logit of the class minus an upper bound (or estimate) of ``E[logsumexp(z)]``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.links import hermite
from pyrolora.models.naming import nearest

TILT_STEPS = 200


def jensen(moments: LogitMoments) -> Tensor:
    """``logsumexp(m + v / 2)``: the bound of VBLL. Loose: it counts curvature 1 / (1 - p) times.

    Source: Harrison, Willes and Snoek, "Variational Bayesian Last Layers", 2024, equation 14.

    Shape:
        ``(examples,)``
    """
    return (moments.mean + 0.5 * moments.variance).logsumexp(-1)


def tilted(moments: LogitMoments) -> Tensor:
    """``min_a a' V a / 2 + logsumexp(m + v / 2 - V a)``: never above `jensen`, which is a = 0.

    Source: Knowles and Minka, "Non-conjugate variational message passing for multinomial and binary regression", 2011.

    Shape:
        ``(examples,)``
    """
    return tilted_at(moments, optimal_tilt(moments))


def tilted_at(moments: LogitMoments, tilt: Tensor) -> Tensor:
    """The tilted bound at any tilt, ``(examples,)`` from ``(examples, classes)``."""
    moved = moments.times(tilt)
    exponent = moments.mean + 0.5 * moments.variance - moved
    return 0.5 * (tilt * moved).sum(-1) + exponent.logsumexp(-1)


@torch.no_grad()
def optimal_tilt(moments: LogitMoments, steps: int = TILT_STEPS) -> Tensor:
    """The tilt that minimises the bound, by a damped fixed point that starts at Jensen's and never gets worse.

    ``a <- a + r (softmax(m + v / 2 - V a) - a)`` is gradient descent in the metric of V for ``r = 1 / (1 + L / 4)`` with L
    the largest eigenvalue of V; undamped it oscillates from variances of about 4 on. No gradient flows through it: at the
    optimum there is none, and elsewhere the bound holds all the same.

    Args:
        moments: moments of the logits.
        steps: steps at most; it stops when no entry moves any more.

    Shape:
        ``(examples, classes)``
    """
    variance = moments.variance
    # the trace bounds the largest eigenvalue of a covariance, and the largest entry is that of a diagonal one
    largest = variance.amax(-1, keepdim=True) if moments.independent else variance.sum(-1, keepdim=True)
    rate = 1 / (1 + largest / 4)
    base = moments.mean + 0.5 * variance
    tilt = torch.zeros_like(base)
    tolerance = 10 * torch.finfo(base.dtype).eps
    for step in range(steps):
        change = (base - moments.times(tilt)).softmax(-1) - tilt
        tilt = tilt + rate * change
        if step % 10 == 9 and bool((rate * change).abs().max() < tolerance):
            break
    return tilt


def bohning(moments: LogitMoments) -> Tensor:
    """``logsumexp(m) + tr(A V) / 2`` with ``A = (I - 11' / C) / 2``, the bound on the softmax's Hessian.

    Source: Böhning, "Multinomial logistic regression algorithm", 1992.

    Shape:
        ``(examples,)``
    """
    classes = moments.mean.shape[-1]
    total = moments.variance.sum(-1)
    joint = total if moments.independent else moments.spread.sum((-2, -1))
    return moments.mean.logsumexp(-1) + 0.25 * (total - joint / classes)


def bouchard(moments: LogitMoments) -> Tensor:
    """A sum of binary bounds, each with Jaakkola's quadratic; the tightest here for variances above about 10.

    Source: Bouchard, "Efficient bounds for the softmax function", 2007.

    Shape:
        ``(examples,)``
    """
    mean, variance = moments.mean, moments.variance
    with torch.no_grad():
        classes = mean.shape[-1]
        shift = mean.mean(-1, keepdim=True)
        for _ in range(50):
            width = (variance + (mean - shift).square()).sqrt().clamp_min(1e-6)
            weight = _jaakkola(width)
            shift = (0.5 * (0.5 * classes - 1) + (weight * mean).sum(-1, keepdim=True)) / weight.sum(-1, keepdim=True)
        width = (variance + (mean - shift).square()).sqrt().clamp_min(1e-6)
        weight = _jaakkola(width)
    away = mean - shift
    terms = 0.5 * (away - width) + weight * (variance + away.square() - width.square()) + functional.softplus(width)
    return shift[..., 0] + terms.sum(-1)


def _jaakkola(width: Tensor) -> Tensor:
    return torch.tanh(0.5 * width) / (4 * width)


def tightest(moments: LogitMoments) -> Tensor:
    """The least of `tilted`, `bohning` and `bouchard` for each example."""
    return torch.stack([tilted(moments), bohning(moments), bouchard(moments)]).amin(0)


def gauss_hermite(moments: LogitMoments) -> Tensor:
    """Two classes: ``m_0 + E[softplus(z_1 - z_0)]`` by quadrature, exact for all but huge variances.

    Shape:
        ``(examples,)``

    Raises:
        ValueError: other than two classes.
    """
    mean, deviation = logit_difference(moments)
    nodes, weights = hermite(mean)
    values = functional.softplus(mean[..., None] + deviation[..., None] * nodes)
    return moments.mean[..., 0] + values @ weights


def logit_difference(moments: LogitMoments) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the second logit minus the first, ``(examples,)`` each.

    Raises:
        ValueError: other than two classes.
    """
    classes = moments.mean.shape[-1]
    if classes != 2:
        raise ValueError(f"Quadrature is for two classes; these data have {classes}. Use 'tilted' or 'mf1'.")
    variance = moments.variance.sum(-1)
    if not moments.independent:
        variance = variance - 2 * moments.spread[..., 0, 1]
    # a gradient of the root at zero would be infinite
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    return moments.mean[..., 1] - moments.mean[..., 0], deviation


def sampled(moments: LogitMoments, draws: int) -> Tensor:
    """Mean of ``logsumexp`` over antithetic logit draws from torch's global random state: unbiased, no bound.

    Logits are sampled, not weights (local reparameterisation), independently for each example.

    Source: Kingma, Salimans and Welling, "Variational Dropout and the Local Reparameterization Trick", 2015.

    Shape:
        ``(examples,)``
    """
    mean = moments.mean
    half = torch.randn(max(1, draws // 2), *mean.shape, dtype=mean.dtype, device=mean.device)
    noise = torch.cat([half, -half])
    if moments.independent:
        away = moments.variance.clamp_min(torch.finfo(mean.dtype).tiny).sqrt() * noise
    else:
        jitter = 1e-6 * moments.variance.mean(-1)[..., None, None] + torch.finfo(mean.dtype).tiny
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        root = torch.linalg.cholesky(moments.spread + jitter * eye)
        away = (root @ noise[..., None])[..., 0]
    return (mean + away).logsumexp(-1).mean(0)


BOUNDS: dict[str, Callable[[LogitMoments], Tensor]] = {
    "jensen": jensen,
    "tilted": tilted,
    "bohning": bohning,
    "bouchard": bouchard,
    "tightest": tightest,
    "gauss_hermite": gauss_hermite,
}
OBJECTIVES = (*BOUNDS, "mc")


@dataclass(frozen=True)
class Objective:
    """Expected log-likelihood of labels, bounded or estimated: ``Objective("tilted")(moments, labels)``.

    Args:
        name: one of `OBJECTIVES`.
        draws: logit draws of ``"mc"``.

    Raises:
        ValueError: an unknown name; the nearest is offered.
    """

    name: str
    draws: int = 32

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(
                f"Unknown objective {self.name!r}. Did you mean {nearest(str(self.name), OBJECTIVES)!r}? "
                f"Objectives: {', '.join(OBJECTIVES)}."
            )

    def __call__(self, moments: LogitMoments, labels: Tensor) -> Tensor:
        """Nats of each example, ``(examples,)``; never above the truth, save for ``"mc"``, which is right on average."""
        known = moments.mean.gather(-1, labels[:, None])[:, 0]
        return known - (sampled(moments, self.draws) if self.name == "mc" else BOUNDS[self.name](moments))
