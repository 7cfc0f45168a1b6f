"""From Gaussian logits to class probabilities: quasi-Monte-Carlo, and closed forms."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.quasirandom import SobolEngine

# logit draws cost nothing beside the gradients, so the Monte-Carlo error is made negligible
LOGIT_DRAWS = 256
# of one expectation: at 200 a softplus is right to 1e-9 for a logit difference of standard deviation 4.5, at 100 to 1e-7
HERMITE_NODES = 200


def softmax_draws(mean: Tensor, covariance: Tensor, generator: torch.Generator | None) -> Tensor:
    """Class probabilities of quasi-random Gaussian logits.

    Args:
        mean: logit means; minus infinity for options that a row lacks.
        covariance: logit covariances.
        generator: seeds the scrambling of the Sobol points.

    Shape:
        mean ``(rows, classes)``, covariance ``(rows, classes, classes)``; returns ``(LOGIT_DRAWS, rows, classes)``
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    classes = mean.shape[-1]
    uniform = SobolEngine(classes, scramble=True, seed=seed).draw(LOGIT_DRAWS, dtype=torch.float64)
    normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).to(mean)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :]
    return (mean + torch.einsum("rij,sj->sri", root, normal)).softmax(-1)


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """``softmax(mean / sqrt(1 + pi/8 var))``, the multi-class probit of Laplace libraries.

    Not invariant to a shift of all logits, unlike `mean_field_softmax`; offered for comparison with them.

    Source: MacKay, "The evidence framework applied to classification networks", 1992.

    Shape:
        mean ``(rows, classes)``, covariance ``(rows, classes, classes)``; returns ``(rows, classes)``
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return (mean / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)


def mean_field_softmax(mean: Tensor, covariance: Tensor) -> Tensor:
    """The mf1 approximation: every pair of logits is a binary problem with its own variance.

    ``p_k ~ 1 / sum_i exp((m_i - m_k) / sqrt(1 + pi/8 (v_k + v_i - 2 v_ki)))``, renormalised. Shift-invariant, uses the
    covariances, and nearly exact for two classes.

    Source: Lu, Ie and Sha, "Mean-field approximation to Gaussian-softmax integral", 2020.

    Shape:
        mean ``(rows, classes)``, covariance ``(rows, classes, classes)``; returns ``(rows, classes)``
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = (variance[..., :, None] + variance[..., None, :] - 2 * covariance).clamp_min(0)
    present = mean.isfinite()
    finite = mean.masked_fill(~present, 0)
    exponent = (finite[..., None, :] - finite[..., :, None]) / (1 + torch.pi / 8 * spread).sqrt()
    exponent = exponent.masked_fill(~present[..., None, :], -torch.inf)
    log_probs = -exponent.logsumexp(-1)
    return log_probs.masked_fill(~present, -torch.inf).softmax(-1)


def laplace_bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of the Dirichlet that matches the Gaussian logits at zero sum.

    Off by 0.1 and more where logit variances exceed about 1, and not invariant to a shift of all logits: where their sum
    hardly varies, setting it to zero moves them by hundreds, and the result says nothing.

    Logits that have no variance left at zero sum are put through the softmax.

    ``alpha_k = (1 - 2/C + exp(m_k) / C^2 sum_l exp(-m_l)) / v_k`` with m and v conditioned on ``sum_k logit_k = 0``.

    Source: Hobbhahn, Kristiadi and Hennig, "Fast predictive uncertainty for classification with Bayesian deep networks",
    2022.

    Shape:
        mean ``(rows, classes)``, covariance ``(rows, classes, classes)``; returns ``(rows, classes)``

    Raises:
        ValueError: rows that lack an option, where classes differ from row to row.
    """
    if not mean.isfinite().all():
        raise ValueError("The Laplace bridge needs every class in every row; use kind='linearised_mf1' for these data.")
    classes = mean.shape[-1]
    # no probability depends on the unit of the covariance, whose products would leave the range of numbers
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    covariance = covariance / largest.masked_fill(largest <= 0, 1)
    total, row_sums = covariance.sum((-2, -1)), covariance.sum(-1)
    # a sum whose variance is round-off is fixed already, and conditioning on it would divide noise by noise
    divisor = total.masked_fill(total <= 8 * classes * torch.finfo(mean.dtype).eps, torch.inf)
    centred = mean - row_sums * (mean.sum(-1) / divisor)[..., None]
    variance = (covariance - row_sums[..., :, None] * row_sums[..., None, :] / divisor[..., None, None]).diagonal(
        dim1=-2, dim2=-1
    )
    least = 8 * torch.finfo(mean.dtype).eps * covariance.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    certain = (variance <= least).all(-1, keepdim=True)
    # in logarithm: conditioning moves logits without bound where the sum is almost fixed
    relative = centred + (-centred).logsumexp(-1, keepdim=True) - 2 * math.log(classes)
    log_alpha = torch.logaddexp(mean.new_tensor(1 - 2 / classes).log(), relative)
    log_alpha = log_alpha - variance.maximum(least).masked_fill(certain, 1).log()
    return torch.where(certain, centred, log_alpha).softmax(-1)


def quadrature(mean: Tensor, covariance: Tensor) -> Tensor:
    """Two classes: ``E[sigmoid(z_1 - z_0)]`` by Gauss-Hermite nodes, exact for all but huge variances.

    Shape:
        mean ``(rows, 2)``, covariance ``(rows, 2, 2)``; returns ``(rows, 2)``

    Raises:
        ValueError: other than two classes.
    """
    if mean.shape[-1] != 2:
        raise ValueError(f"Quadrature is for two classes; these data have {mean.shape[-1]}. Use kind='linearised_mf1'.")
    variance = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) - 2 * covariance[..., 0, 1]
    nodes, weights = hermite(mean)
    difference = (mean[..., 1] - mean[..., 0])[..., None] + variance.clamp_min(0).sqrt()[..., None] * nodes
    second = difference.sigmoid() @ weights
    return torch.stack([1 - second, second], dim=-1)


def hermite(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of an expectation under the standard Normal, of the type and device of a tensor."""
    places, weights = _hermite()
    return torch.as_tensor(places).to(like), torch.as_tensor(weights).to(like)


@cache
def _hermite() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    places, weights = np.polynomial.hermite.hermgauss(HERMITE_NODES)
    return np.sqrt(2) * places, weights / np.sqrt(np.pi)


# kind of prediction -> closed form
LINKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linearised_mf1": mean_field_softmax,
    "linearised_probit": probit,
    "linearised_bridge": laplace_bridge,
}
# for two classes besides
BINARY_LINKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linearised_quadrature": quadrature}

# links for which the contrasts between logits say everything
SHIFT_INVARIANT = (mean_field_softmax, quadrature)
