"""Posteriors of a last layer against draws from the exact one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.features import FeatureCache
from pyrolora.inference.last_layer import LastLayerHead
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.tasks import EncodedSplit, Split

# draws of a posterior: variances of logit differences are known to 2 % and less
DRAWS = 4000


@dataclass(frozen=True)
class GoldRow:
    """One posterior against the gold standard, averaged over examples.

    Attributes:
        name: of the posterior.
        variance_ratio: variance of the logit differences over the gold's; 1 is right, less is overconfident.
        kl: KL from the gold's predictive probabilities to the posterior's, nats.
        total_variation: half the absolute difference of the predictive probabilities.
    """

    name: str
    variance_ratio: float
    kl: float
    total_variation: float


@dataclass(frozen=True)
class GoldComparison:
    """A table of `GoldRow`.

    Attributes:
        rows: one for each posterior.
        noise: KL in nats that the gold standard's finite number of draws adds to that of any posterior, on average: a quarter
            of the KL between its halves, whose difference has four times the variance of the whole's error.
    """

    rows: tuple[GoldRow, ...]
    noise: float

    def __getitem__(self, name: str) -> GoldRow:
        """The row of a posterior."""
        return next(row for row in self.rows if row.name == name)

    def to_markdown(self) -> str:
        """The table as text."""
        lines = ["| Posterior | Variance ratio | KL from gold (nats) | Total variation |", "|---|---|---|---|"]
        lines += [
            f"| {row.name} | {row.variance_ratio:.2f} | {row.kl:.5f} | {row.total_variation:.4f} |" for row in self.rows
        ]
        lines += ["", f"Of each KL about {self.noise:.5f} is the noise of the gold standard's draws."]
        return "\n".join(lines)


def compare_to_gold(
    gold: Posterior, posteriors: Mapping[str, Posterior], data: Split | EncodedSplit, *, seed: int = 0
) -> GoldComparison:
    """How far posteriors of a last layer are from the exact one: ``compare_to_gold(nuts, {"vbll": vbll}, task.test)``.

    Args:
        gold: draws of the exact posterior, such as `NUTS` returns.
        posteriors: name -> posterior of the same model with the same weights below the last layer.
        data: examples to predict.
        seed: seeds the draws.

    Raises:
        ValueError: a model without a last layer on one feature vector a row, or a posterior of another network or with other
            weights below the last layer, which has other features.
    """
    LastLayerHead(gold.model)
    for name, posterior in posteriors.items():
        _check_same_features(gold, name, posterior)
    features = FeatureCache(None).features(gold.model, gold.mean(), data).values
    weights = _weights(gold, seed)
    probs, spread = _logit_statistics(gold, features, weights)
    halves = [_logit_statistics(gold, features, half)[0] for half in weights.tensor_split(2)]
    noise = 0.25 * 0.5 * (_divergence(*halves) + _divergence(*reversed(halves)))
    rows = []
    for name, posterior in posteriors.items():
        other, width = _logit_statistics(posterior, features, _weights(posterior, seed))
        distance = 0.5 * (probs - other).abs().sum(-1).mean()
        rows.append(GoldRow(name, float(width.sum() / spread.sum()), _divergence(probs, other), float(distance)))
    return GoldComparison(tuple(rows), noise)


def _divergence(probs: Tensor, others: Tensor) -> float:
    """Mean KL over rows of class probabilities, nats."""
    return float((probs * (probs.log() - others.log())).sum(-1).mean())


@torch.no_grad()
def _weights(posterior: Posterior, seed: int) -> Tensor:
    """Draws of the last layer: all that are kept, in the order of the chains, or as many as are enough of a distribution."""
    kept = getattr(LastLayerHead(posterior.model).factor(posterior.guide), "values", None)
    if kept is not None:
        return kept
    return posterior.sample(DRAWS, generator=torch.Generator().manual_seed(seed))[HEAD]


@torch.no_grad()
def _logit_statistics(posterior: Posterior, features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean probabilities ``(rows, classes)`` and variances of all logit differences ``(rows, classes, classes)``."""
    head = LastLayerHead(posterior.model)
    # features of many rows times thousands of draws: some rows at a time
    probs, spread = [], []
    for part in features.split(16):
        logits = head.logits(part, weights).double() / posterior.logit_temperature
        probs.append(logits.softmax(-1).mean(0))
        away = logits - logits.mean(0)
        covariance = torch.einsum("snc,snk->nck", away, away) / (len(weights) - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        spread.append(variance[..., :, None] + variance[..., None, :] - 2 * covariance)
    return torch.cat(probs), torch.cat(spread)


def _check_same_features(gold: Posterior, name: str, posterior: Posterior) -> None:
    if gold.model.backbone.fingerprint != posterior.model.backbone.fingerprint:
        raise ValueError(
            f"The posterior {name!r} belongs to another network than the gold standard, so they see other features. Fit both "
            "on one backbone."
        )
    ours, theirs = gold.mean(), posterior.mean()
    for site in ours:
        if site != HEAD and (site not in theirs or not torch.equal(ours[site], theirs[site])):
            raise ValueError(
                f"The posterior {name!r} differs from the gold standard at {site!r}, below the last layer, so they see other "
                "features. Fit both on top of one estimate: fit(..., estimate=map_posterior)."
            )
