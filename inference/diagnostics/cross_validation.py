"""Leave-one-out cross-validation from the draws of one fit, and the comparison of several fits by it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrolora.inference.arviz import to_inference_data
from pyrolora.inference.diagnostics.importance import MOST_DIMENSIONS, pareto_smooth, threshold
from pyrolora.models.tasks import EncodedSplit, Split

if TYPE_CHECKING:
    from pyrolora.inference.posterior import Posterior

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """Expected log predictive density of each example, had it not been fitted.

    Attributes:
        elpd: sum over examples, nats.
        standard_error: of the sum.
        effective_parameters: how much less than its density with the example: what the fit took from the examples.
        pointwise: of each example, nats, ``(examples,)``.
        khat: tail shape of each example's weights, ``(examples,)``; above `threshold` the example's own value is not to be
            trusted.
        threshold: largest k-hat to trust.
    """

    elpd: float
    standard_error: float
    effective_parameters: float
    pointwise: Tensor
    khat: Tensor
    threshold: float

    @property
    def unreliable(self) -> int:
        """Number of examples whose k-hat is above the threshold."""
        return int((self.khat > self.threshold).sum())


def loo(
    posterior: "Posterior", train: Split | EncodedSplit, *, draws: int = 1000, corrected: bool = False, seed: int = 0
) -> LeaveOneOut:
    """PSIS-LOO on the rows that a posterior was fitted to: ``loo(posterior, task.train).elpd``.

    Args:
        posterior: a fitted posterior with a width.
        train: the rows that it was fitted to.
        draws: weight draws.
        corrected: weigh the draws by true over approximate posterior density as well; for few dimensions only.
        seed: seeds the draws.

    Raises:
        ValueError: a point estimate, or a correction over more than 2,000 dimensions or where some site has no density.

    Vehtari, Gelman and Gabry 2017, "Practical Bayesian model evaluation", equation 10; Magnusson et al. 2019, "Bayesian
    leave-one-out cross-validation for large data", equation 6 for the correction.
    """
    if posterior.is_point:
        raise ValueError("A point estimate has one draw: it cannot leave an example out. Fit a posterior with a width.")
    model = posterior.model
    factors = dict(posterior.guide.items())
    dimensions = sum(model.sites[name].numel for name, factor in factors.items() if "scale" in factor.roles.values())
    if corrected and dimensions > MOST_DIMENSIONS:
        raise ValueError(
            f"corrected=True weighs draws in {dimensions:,} dimensions, expected at most {MOST_DIMENSIONS:,}: the weights "
            "would be one draw's. Use corrected=False."
        )
    tree = posterior.to_arviz(
        sites=list(factors)[:1], draws=draws, data=train, train=train if corrected else None, seed=seed
    )
    likelihood = torch.from_numpy(tree["log_likelihood"]["label"].values[0]).double()
    ratios = -likelihood
    if corrected:
        stats = tree["sample_stats"]
        if "lp" not in stats:
            raise ValueError(
                "corrected=True needs the density of every prior, and one is a callable. Use corrected=False."
            )
        ratios = ratios + torch.from_numpy(stats["lp"].values[0] - stats["log_q"].values[0])[:, None]
    pointwise, khats = [], []
    for column in range(ratios.shape[1]):
        weights, khat = pareto_smooth(ratios[:, column])
        pointwise.append((weights + likelihood[:, column]).logsumexp(0))
        khats.append(khat)
    values = torch.stack(pointwise)
    inside = likelihood.logsumexp(0) - torch.tensor(float(draws)).double().log()
    found = LeaveOneOut(
        elpd=float(values.sum()),
        standard_error=float(values.std() * len(values) ** 0.5),
        effective_parameters=float((inside - values).sum()),
        pointwise=values,
        khat=torch.tensor(khats, dtype=torch.float64),
        threshold=threshold(draws),
    )
    if found.unreliable:
        logger.warning(
            "%d of %d examples have a k-hat above %.2f: the fit leans on them, and the estimate leaves them out too kindly.",
            found.unreliable, len(values), found.threshold,
        )  # fmt: skip
    return found


def compare_loo(
    posteriors: Mapping[str, "Posterior"], train: Split | EncodedSplit, *, draws: int = 1000, seed: int = 0
) -> Any:
    """ArviZ's comparison of fits to the same rows: ``compare_loo({"blob": blob, "laplace": laplace}, task.train)``.

    Args:
        posteriors: name -> posterior.
        train: the rows that all were fitted to.
        draws: weight draws of each.
        seed: seeds the draws.

    Returns:
        The table of ``az.compare``, best first, a row a posterior.

    Raises:
        ValueError: fewer than two posteriors, or a point estimate among them.
    """
    if len(posteriors) < 2:
        raise ValueError(f"posteriors: got {len(posteriors)}, expected at least two to compare.")
    import arviz

    data = {}
    for name, posterior in posteriors.items():
        if posterior.is_point:
            raise ValueError(
                f"{name!r} is a point estimate, which cannot leave an example out. Compare it by `evaluate`."
            )
        first = next(iter(posterior.model.sites))
        data[name] = to_inference_data(posterior.to_arviz(sites=first, draws=draws, data=train, seed=seed))
    return arviz.compare(data)
