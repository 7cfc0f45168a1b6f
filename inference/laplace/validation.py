"""The prior precision that predicts validation data best."""

import logging
from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from pyrolora.inference.laplace.precision import LOG_PRECISION_BOUNDS, NormalPrior
from pyrolora.inference.laplace.structures import Structure, logit_covariance
from pyrolora.inference.linearised import linearised_logits
from pyrolora.inference.links import softmax_draws
from pyrolora.inference.logit_gradients import LogitGradients
from pyrolora.models.tasks import EncodedSplit

logger = logging.getLogger(__name__)

# evenly spaced in the logarithm of the precision
CANDIDATES = 19


def best_factor(
    structures: Mapping[str, Structure],
    priors: Mapping[str, NormalPrior],
    gradients: LogitGradients,
    data: EncodedSplit,
    *,
    temperature: float,
    batch_size: int,
    progress: bool,
) -> float:
    """Factor on all prior precisions with the lowest negative log-likelihood; one set of gradients serves every candidate.

    Args:
        structures: site name -> decomposed curvature.
        priors: site name -> prior.
        gradients: where to linearise.
        data: validation data.
        temperature: factor on the covariance.
        batch_size: examples at once.
        progress: show a bar.
    """
    factors = tuple(torch.linspace(*LOG_PRECISION_BOUNDS, CANDIDATES).exp().tolist())
    precisions = {name: prior.precision for name, prior in priors.items()}
    totals = torch.zeros(len(factors), dtype=torch.float64)
    total = data.steps_per_epoch(batch_size)
    for batch in tqdm(data.batches(batch_size), total=total, desc="validation", disable=not progress, leave=False):
        mean, covariances = linearised_logits(
            gradients,
            batch,
            lambda jacobians: logit_covariance(structures, jacobians, precisions, factors),
            contrasts=True,
        )
        labels = batch["labels"].to(mean.device)
        for index in range(len(factors)):
            probs = softmax_draws(mean, temperature * covariances[:, index], torch.Generator().manual_seed(0)).mean(0)
            totals[index] -= float(probs.gather(-1, labels[:, None]).clamp_min(1e-30).log().sum())
    best = int(totals.argmin())
    if best in (0, len(factors) - 1):
        logger.warning(
            "The best factor on the prior precision, %.3g, lies at the edge of the search; the validation data "
            "want a posterior that is %s than any tried.", factors[best], "wider" if best == 0 else "narrower"
        )  # fmt: skip
    return factors[best]
