"""Posterior predictive probabilities, draw by draw."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split, row_count

Batch = Mapping[str, Tensor]

# rows times draws that go through the network at once
ROWS_AT_ONCE = 256
# draws between two looks at the Monte-Carlo error; even, so that mirrored pairs stay together
DRAWS_A_ROUND = 4
# independent parts below which a standard error is a guess: that of two is less than half of the true one in 38 % of all
# cases, that of four in 14 %
FEWEST_UNITS = 4


@dataclass(frozen=True)
class Predictive:
    """Class probabilities of every draw.

    Attributes:
        probs: probabilities, ``(draws, rows, classes)``, float32 on the CPU.
        kind: how they were made: ``"mc"`` (weight draws through the network), ``"mean"`` (the posterior mean),
            ``"linearised"`` and its closed forms (Gaussian logits around the mean), or ``"token"`` and ``"flipout"`` (noise
            for every token); see `Posterior.predict`.
        labels: observed classes ``(rows,)``, or None.
        energy: minus the log-sum-exp of the class logits, nats, ``(draws, rows)``; None for a kind that makes no logits.
    """

    probs: Tensor
    kind: str
    labels: Tensor | None = None
    energy: Tensor | None = None

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


class RowPrediction(NamedTuple):
    """Probabilities ``(draws, rows, classes)`` of a batch, and its energies ``(draws, rows)`` where logits were made."""

    probs: Tensor
    energy: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor) -> "RowPrediction":
        """Softmax and free energy of class logits ``(draws, rows, classes)``."""
        return cls(logits.softmax(-1), -logits.logsumexp(-1))

    def tempered(self, temperature: float) -> "RowPrediction":
        """Probabilities of the logits divided by a temperature, draw by draw; the energy stays that of the logits."""
        if temperature == 1:
            return self
        # log-probabilities are logits up to a constant; a class that an example lacks keeps its zero
        return RowPrediction((self.probs.log() / temperature).softmax(-1), self.energy)


def join_draws(parts: list[Predictive]) -> Predictive:
    """Rounds of draws of the same rows as one prediction."""
    energies = [part.energy for part in parts if part.energy is not None]
    energy = torch.cat(energies) if len(energies) == len(parts) else None
    return Predictive(torch.cat([part.probs for part in parts]), parts[0].kind, parts[0].labels, energy)


def gather_rows(parts: list[tuple[Tensor, RowPrediction]], labels: Tensor | None, kind: str) -> Predictive:
    """Put batches of probabilities back into the order of the data set.

    Args:
        parts: pairs of (positions in the data set, prediction).
        labels: labels in the order of the data set.
        kind: see `Predictive`.

    Shape:
        positions ``(rows,)``, probabilities ``(draws, rows, classes)``
    """
    order = torch.cat([positions.cpu() for positions, _ in parts]).argsort()
    probs = torch.cat([prediction.probs.float().cpu() for _, prediction in parts], dim=1)
    energies = [prediction.energy for _, prediction in parts]
    kept = [energy.float().cpu() for energy in energies if energy is not None]
    energy = torch.cat(kept, dim=1)[:, order] if len(kept) == len(energies) else None
    return Predictive(probs[:, order], kind, labels, energy)


def monte_carlo_error(parts: list[Predictive], sampler: str) -> float:
    """Standard error of the mean probabilities over draws, averaged over rows and classes.

    Args:
        parts: rounds of draws.
        sampler: how they were spread. Mirrored draws are judged by the means of their pairs, strata by the means of rounds;
            of fewer than `FEWEST_UNITS` of them the error is taken to be infinite.
    """
    if sampler == "stratified":
        units = torch.stack([part.probs.mean(0) for part in parts])
    elif sampler == "antithetic":
        units = torch.cat([part.probs[: len(part.probs) // 2 * 2].unflatten(0, (-1, 2)).mean(1) for part in parts])
    else:
        units = torch.cat([part.probs for part in parts])
    if len(units) < FEWEST_UNITS:
        return float("inf")
    return float((units.var(0) / len(units)).sqrt().mean())


def logits_of_draws(model: BayesianModel, batch: Batch, draw: Mapping[str, Tensor], draws: int) -> Tensor:
    """Class logits of a batch under every draw, as many draws at once as memory is meant to bear, the trunk run once.

    Args:
        model: the model.
        batch: a batch of an encoded split.
        draw: site name -> ``(draws, *site.shape)``.
        draws: number of draws.

    Shape:
        ``(draws, rows, classes)``
    """
    if model.first_block > 0 and "trunk" not in batch:
        batch = {**batch, "trunk": model.backbone.trunk(batch, model.first_block)}
    at_once = max(1, ROWS_AT_ONCE // row_count(batch))
    chunks = []
    for first in range(0, draws, at_once):
        part = {name: value[first : first + at_once] for name, value in draw.items()}
        chunks.append(model.logits(batch, part, local=True))
    return torch.cat(chunks)


@torch.no_grad()
def log_likelihood(
    model: BayesianModel, data: Split | EncodedSplit, draw: Mapping[str, Tensor], *, batch_size: int = 32
) -> Tensor:
    """Log probability of every label under every given draw: ``log_likelihood(model, task.train, posterior.sample(100))``.

    Args:
        model: the model.
        data: labelled rows.
        draw: site name -> ``(draws, *site.shape)``.
        batch_size: rows at once, before draws are put on the batch axis.

    Shape:
        ``(draws, rows)`` float64 on the CPU, nats.
    """
    encoded = model.encode(data)
    draws = next(iter(draw.values())).shape[0]
    found = torch.empty(draws, len(encoded), dtype=torch.float64)
    for batch in encoded.batches(batch_size, device=model.backbone.device):
        log_probs = logits_of_draws(model, batch, draw, draws).double().log_softmax(-1)
        labels = batch["labels"].expand(draws, -1)[..., None]
        found[:, batch["index"].cpu()] = log_probs.gather(-1, labels)[..., 0].cpu()
    model.release()
    return found
