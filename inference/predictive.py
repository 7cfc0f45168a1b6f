"""Posterior predictive probabilities, draw by draw."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# rows times draws that go through the network at once
ROWS_AT_ONCE = 256
# draws between two looks at the Monte-Carlo error; even, so that mirrored pairs stay together
DRAWS_A_ROUND = 4


@dataclass(frozen=True)
class Predictive:
    """Class probabilities of every draw.

    Attributes:
        probs: probabilities, ``(draws, rows, classes)``, float32 on the CPU.
        kind: how they were made: ``"mc"`` (weight draws through the network), ``"mean"`` (the posterior mean), or
            ``"linearised"`` (Gaussian logits around the mean).
        labels: observed classes ``(rows,)``, or None.
    """

    probs: Tensor
    kind: str
    labels: Tensor | None = None

    @property
    def mean_probs(self) -> Tensor:
        """Posterior predictive, the mean over draws, ``(rows, classes)``."""
        return self.probs.mean(0)

    @property
    def log_likelihood(self) -> Tensor:
        """Log probability of the observed class under each draw, nats, ``(draws, rows)``.

        Raises:
            ValueError: the data had no labels.
        """
        if self.labels is None:
            raise ValueError("These data have no labels, so there is no log-likelihood. Predict on labelled rows.")
        index = self.labels.expand(self.probs.shape[0], -1)[..., None]
        return self.probs.gather(-1, index)[..., 0].clamp_min(torch.finfo(self.probs.dtype).tiny).log()


def gather_rows(parts: list[tuple[Tensor, Tensor]], labels: Tensor | None, kind: str) -> Predictive:
    """Put batches of probabilities back into the order of the data set.

    Args:
        parts: pairs of (positions in the data set, probabilities).
        labels: labels in the order of the data set.
        kind: see `Predictive`.

    Shape:
        positions ``(rows,)``, probabilities ``(draws, rows, classes)``
    """
    index = torch.cat([positions for positions, _ in parts])
    probs = torch.cat([values for _, values in parts], dim=1)
    ordered = torch.empty_like(probs)
    ordered[:, index] = probs
    return Predictive(ordered, kind, labels)


def monte_carlo_error(parts: list[Predictive], sampler: str) -> float:
    """Standard error of the mean probabilities over draws, averaged over rows and classes.

    Args:
        parts: rounds of draws.
        sampler: how they were spread. Mirrored draws are judged by the means of their pairs, strata by the means of rounds.
    """
    if sampler == "stratified":
        units = torch.stack([part.probs.mean(0) for part in parts])
    elif sampler == "antithetic":
        units = torch.cat([part.probs[: len(part.probs) // 2 * 2].unflatten(0, (-1, 2)).mean(1) for part in parts])
    else:
        units = torch.cat([part.probs for part in parts])
    if len(units) < 2:
        return float("inf")
    return float((units.var(0) / len(units)).sqrt().mean())


Batch = Mapping[str, Tensor]
