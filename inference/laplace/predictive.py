"""The linearised predictive: Gaussian logits around the estimate, pushed through the softmax."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyrolora.inference.laplace.curvature import LogitGradients

# logit draws cost nothing beside the Jacobian, so the Monte-Carlo error is made negligible
LOGIT_DRAWS = 256
# elements of Jacobian alive at once (float32: 128 MB); four times as many raised the process's peak to 4.6 GB for no speed
JACOBIAN_ELEMENTS = 2**25

Covariance = Callable[[dict[str, Tensor]], Tensor]


def linearised_logits(
    gradients: LogitGradients, batch: Mapping[str, Tensor], covariance: Covariance
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the logits under ``f(w) = f(w*) + J (w - w*)``.

    Source: Immer et al., "Improving predictions of Bayesian neural nets via local linearization", 2021.

    Args:
        gradients: where to linearise.
        batch: a batch.
        covariance: from the Jacobian to the logit covariance of each row.

    Shape:
        ``(rows, classes)`` and ``(rows, classes, classes)``
    """
    weights = sum(value.numel() for name, value in gradients.estimate.items() if name in gradients.names)
    classes = gradients.model.classes or batch["option_mask"].shape[1]
    rows = batch["input_ids"].shape[0]
    at_once = max(1, JACOBIAN_ELEMENTS // (weights * classes))
    means, covariances = [], []
    for first in range(0, rows, at_once):
        some = {key: value[first : first + at_once] for key, value in batch.items()}
        logits, jacobian = gradients.jacobian(some)
        means.append(logits)
        covariances.append(covariance(jacobian))
    return torch.cat(means), torch.cat(covariances)


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
