"""Pareto-smoothed importance sampling: is the posterior near enough to the true one to be corrected by weights?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyrolora.inference.predictive import log_likelihood
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site
from pyrolora.models.tasks import EncodedSplit, Split

if TYPE_CHECKING:
    from pyrolora.inference.posterior import Posterior

# with a scale that is wrong by 1 % and nothing else, k-hat passes 0.1 at 1,000 dimensions and 0.6 at 18,000: beyond this
# many it judges the number of dimensions and not the posterior
MOST_DIMENSIONS = 2_000
# a smoothed tail of fewer draws has no shape to fit
FEWEST_DRAWS = 100


@dataclass(frozen=True)
class ParetoDiagnosis:
    """Shape of the tail of importance ratios.

    Attributes:
        khat: estimated shape; infinite tails have no weights to trust.
        threshold: largest value at which weights of that many draws can be trusted.
        dimensions: random weights that the ratios are of.
        draws: number of draws.
    """

    khat: float
    threshold: float
    dimensions: int
    draws: int

    @property
    def good(self) -> bool:
        """Whether importance weights would correct the posterior: it is close to the true one."""
        return self.khat < self.threshold

    def __str__(self) -> str:
        verdict = "close to the true posterior" if self.good else "not close to the true posterior"
        return (
            f"k-hat {self.khat:.2f} (good below {self.threshold:.2f} for {self.draws} draws) in {self.dimensions:,} "
            f"dimensions: {verdict}"
        )


def pareto_smooth(log_ratios: Tensor) -> tuple[Tensor, float]:
    """Smooth the largest importance ratios and estimate the shape of their tail.

    ``weights, khat = pareto_smooth(log_p - log_q)``

    The weights are logarithms and normalised.

    Args:
        log_ratios: logarithms of importance ratios, up to a constant.

    Shape:
        log_ratios: ``(draws,)``. Returns the same shape, float64, whose exponentials sum to one.

    Raises:
        ValueError: fewer than 100 ratios, or one that is not finite.

    Vehtari et al. 2024, "Pareto smoothed importance sampling", algorithm 1, by ArviZ.
    """
    values = log_ratios.detach().cpu().double()
    if values.ndim != 1 or len(values) < FEWEST_DRAWS:
        raise ValueError(
            f"log_ratios: got shape {tuple(values.shape)}, expected (draws,) with at least {FEWEST_DRAWS} draws. "
            "Take draws=1000."
        )
    if not values.isfinite().all():
        raise ValueError(
            f"log_ratios: {int((~values.isfinite()).sum())} of {len(values)} are not finite, expected finite numbers. A site "
            "that is a point has no density: leave it out."
        )
    if bool((values == values[0]).all()):
        # equal weights, for which no tail can be fitted: the approximation is the truth
        return torch.full_like(values, -math.log(len(values))), -math.inf
    if int(version("arviz").split(".")[0]) >= 1:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(values.numpy())
    else:
        import arviz

        smoothed, khat = arviz.psislw(values.numpy())
    weights = torch.from_numpy(np.array(smoothed, dtype=np.float64))
    return weights - weights.logsumexp(0), float(khat)


def threshold(draws: int) -> float:
    """Largest k-hat at which so many draws give weights to trust: ``threshold(1000)``.

    Vehtari et al. 2024, equation 13: ``min(1 - 1 / log10(draws), 0.7)``.
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def posterior_khat(
    posterior: "Posterior",
    train: Split | EncodedSplit,
    *,
    sites: str | Sequence[str],
    layer: int | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> ParetoDiagnosis:
    """k-hat of a few sites, or of one layer of them, given that all other weights are at their posterior mean.

    ``print(posterior_khat(posterior, task.train, sites="head.weight"))``

    The true posterior is the untempered one: a cold posterior is narrower and fails, as it should.

    Args:
        posterior: what is judged.
        train: the rows that it was fitted to.
        sites: glob pattern or patterns of the sites.
        layer: number of one block; all layers of the sites by default.
        draws: number of draws.
        seed: seeds the draws.

    Raises:
        ValueError: a pattern that matches no site, a site that is a point or has a prior without a density, a layer that the
            sites lack or that is not independent of the others in the posterior, or more than 2,000 dimensions.

    Yao et al. 2018, "Yes, but did it work? Evaluating variational inference", algorithm 1.
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    model = posterior.model
    chosen = [site for site in model.sites.values() if any(site.matches(pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f"No site matches {patterns}. Did you mean {nearest(patterns[0], model.sites)!r}? "
            f"Sites: {', '.join(model.sites)}."
        )
    factors = dict(posterior.guide.items())
    described = model.prior.to_dict()
    for site in chosen:
        if "scale" not in factors[site.name].roles.values():
            raise ValueError(
                f"The site {site.name!r} is a point in this posterior, which has no density. Choose sites with a width."
            )
        if site.hyper or described[site.name]["prior"] == "callable":
            raise ValueError(
                f"The prior of {site.name!r} depends on other sites, so its own density is not known here. Choose sites with "
                "a declared distribution."
            )
    dimensions = sum(site.numel // (len(site.layers) if layer is not None and site.layers else 1) for site in chosen)
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(
            f"k-hat of {dimensions:,} dimensions would judge their number: it passes 0.7 for a scale that is wrong by a few "
            f"per cent. Choose fewer sites or one layer, up to {MOST_DIMENSIONS:,}, or look at `loo` and `calibrate_engine`."
        )
    mean = posterior.mean()
    drawn = posterior.sample(draws, generator=torch.Generator().manual_seed(seed))
    values = {name: value.expand(draws, *value.shape).clone() for name, value in mean.items()}
    for site in chosen:
        values[site.name] = _one_layer(site, factors, drawn[site.name], values[site.name], layer)
    zero = torch.zeros(draws, device=model.backbone.device)
    log_q = sum((factors[site.name].distribution().log_prob(values[site.name]) for site in chosen), zero)
    log_prior = sum((model.prior(site).log_prob(values[site.name]) for site in chosen), zero)
    log_p = log_prior.detach().double().cpu() + log_likelihood(model, train, values).sum(1)
    khat = pareto_smooth(log_p - log_q.detach().double().cpu())[1]
    return ParetoDiagnosis(khat, threshold(draws), dimensions, draws)


def _one_layer(
    site: Site, factors: Mapping[str, torch.nn.Module], drawn: Tensor, mean: Tensor, layer: int | None
) -> Tensor:
    """The draws, with all layers but one at the mean if one is asked for."""
    if layer is None:
        return drawn
    if layer not in site.layers:
        raise ValueError(
            f"The site {site.name!r} has no layer {layer}; it has {', '.join(map(str, site.layers)) or 'none'}."
        )
    distribution = factors[site.name].distribution()  # type: ignore[operator]
    at_mean = distribution.log_prob(mean[0])
    apart = torch.zeros(())
    for entry in range(len(site.layers)):
        one = mean[0].clone()
        one[entry] = drawn[0, entry]
        apart = apart + distribution.log_prob(one) - at_mean
    together = distribution.log_prob(drawn[0]) - at_mean
    if not torch.allclose(apart.detach(), together.detach(), rtol=1e-3, atol=1e-3 * site.numel**0.5):
        raise ValueError(
            f"The layers of {site.name!r} depend on each other in this posterior, so that one alone is not drawn from its "
            "conditional. Leave layer out, or use a guide with independent layers."
        )
    entry = site.layers.index(layer)
    values = mean.clone()
    values[:, entry] = drawn[:, entry]
    return values
