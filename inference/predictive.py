"""Posterior predictive probabilities, draw by draw."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# rows times draws that go through the network at once
ROWS_AT_ONCE = 256


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


Batch = Mapping[str, Tensor]
