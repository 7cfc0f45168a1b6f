"""Prior precisions: read from the declared prior, or chosen by the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyrolora.models.prior_declarations import Learned, Relative
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site

# natural logarithm of the smallest and largest prior precision that a search considers
LOG_PRECISION_BOUNDS = (-4.0, 14.0)
GROUPS = ("site", "layer", "model")


@dataclass(frozen=True)
class NormalPrior:
    """Mean and precision of a Normal prior over one site, both of shapes that broadcast to the site's."""

    mean: Tensor
    precision: Tensor

    def by_entry(self, entries: int) -> Tensor:
        """The precision as ``(1 or entries, 1 or directions)``, to meet eigenvalues ``(entries, directions)``."""
        if self.precision.numel() == 1:
            return self.precision.reshape(1, 1)
        return self.precision.reshape(entries, -1)


def declared_prior(model: BayesianModel, names: Sequence[str]) -> dict[str, NormalPrior]:
    """The Normal prior declared for each site, as Laplace needs it.

    Raises:
        ValueError: a prior that is not a fixed or learned Normal; Laplace's precision would not be the declared one.
    """
    found = {}
    for name in names:
        declaration = model.prior.declared[name]
        base = declaration.base_dist if isinstance(declaration, dist.Independent) else declaration
        # several learned scales are so many even where they still agree
        apart = isinstance(base, Learned) and model.prior.scales[name].dim() > 0
        if isinstance(base, Learned):
            base = dist.Normal(torch.zeros_like(model.prior.scales[name]), model.prior.scales[name])
        if isinstance(base, Relative):
            resolved: Any = model.prior(model.sites[name])
            base = resolved.base_dist
        if not isinstance(base, dist.Normal):
            raise ValueError(
                f"Laplace needs a Normal prior with fixed or learned scale; {name!r} has "
                f"{model.prior.to_dict()[name]['prior']}. Declare dist.Normal(0., 0.2) there, leave the site out with "
                "sites=, or use SVI, which takes any prior."
            )
        loc, scale = (value.to(model.backbone.device, model.backbone.site_dtype) for value in (base.loc, base.scale))
        precision = scale.square().reciprocal()
        found[name] = NormalPrior(loc, _shared(precision, model.sites[name], apart))
    return found


def _shared(precision: Tensor, site: Site, apart: bool) -> Tensor:
    """One number if all are equal, else one for each entry of a stack where that says it all, else all of them.

    Args:
        precision: of a shape that broadcasts to the site's.
        site: whose it is.
        apart: whether dimensions along which it may differ are to be told by its shape, whatever its values are now.
    """
    whole = precision.expand(site.shape)
    entries = whole[(slice(None), *[slice(1)] * (whole.dim() - 1))]
    if apart:
        return entries if site.modules and precision.numel() == len(entries) == precision.shape[0] else whole
    first = whole.flatten()[0]
    if (whole == first).all():
        return first
    return entries if site.modules and (whole == entries).all() else whole


def log_evidence(
    log_likelihood: float,
    estimate: Mapping[str, Tensor],
    priors: Mapping[str, NormalPrior],
    eigenvalues: Mapping[str, Tensor],
) -> float:
    """Laplace's log marginal likelihood in nats.

    ``log p(D) = log p(D|w) - 1/2 sum_i [ (w_i - m_i)^2 t_i + log(h_i + t_i) - log t_i ]`` with prior precision t and
    eigenvalues h of the curvature (its diagonal for a diagonal structure).

    Source: MacKay, "A practical Bayesian framework for backpropagation networks", 1992.

    Args:
        log_likelihood: log likelihood of the data at the estimate, nats.
        estimate: site name -> estimate.
        priors: site name -> prior; for eigenvalues that are no diagonal, one precision for each entry of the stack.
        eigenvalues: site name -> ``(entries, directions)``.
    """
    total = log_likelihood
    for name, values in eigenvalues.items():
        prior = priors[name]
        misfit = ((estimate[name].double() - prior.mean.double()).square() * prior.precision.double()).sum()
        precision = prior.by_entry(values.shape[0]).double()
        volume = torch.log1p(values.double().clamp_min(0) / precision).sum()
        total -= 0.5 * float(misfit + volume)
    return total


def evidence_precision(
    estimate: Mapping[str, Tensor],
    priors: Mapping[str, NormalPrior],
    eigenvalues: Mapping[str, Tensor],
    group: str = "site",
) -> dict[str, NormalPrior]:
    """The precisions that maximise the evidence, by bounded searches in their logarithm on cached eigenvalues.

    The evidence is a sum over weights, so every group that shares a precision is a one-dimensional problem of its own.

    Args:
        estimate: site name -> estimate.
        priors: site name -> prior, whose means are kept.
        eigenvalues: site name -> ``(entries, directions)``.
        group: what shares a precision: a ``"site"``, an entry of a site (``"layer"``), or the whole ``"model"``.
    """
    spreads, curvatures = {}, {}
    for name, values in eigenvalues.items():
        away = (estimate[name].double() - priors[name].mean.double()).square()
        spreads[name] = away.reshape(values.shape[0], -1).sum(1)
        curvatures[name] = values.double().clamp_min(0)
    if group == "model":
        shared = _best_precision(
            sum(float(spread.sum()) for spread in spreads.values()),
            torch.cat([curvature.flatten() for curvature in curvatures.values()]),
        )
        found = dict.fromkeys(eigenvalues, torch.tensor(shared))
    elif group == "site":
        found = {
            name: torch.tensor(_best_precision(float(spreads[name].sum()), curvatures[name].flatten()))
            for name in eigenvalues
        }
    else:
        found = {}
        for name in eigenvalues:
            pairs = zip(spreads[name].tolist(), curvatures[name], strict=True)
            best = torch.tensor([_best_precision(spread, curvature) for spread, curvature in pairs])
            found[name] = best.reshape(()) if len(best) == 1 else best.reshape(-1, *[1] * (estimate[name].dim() - 1))
    return {name: NormalPrior(priors[name].mean, found[name].to(priors[name].precision)) for name in eigenvalues}


def _best_precision(spread: float, curvature: Tensor) -> float:
    def negative(log_precision: float) -> float:
        precision = torch.tensor(log_precision, dtype=torch.float64).exp()
        return 0.5 * float(spread * precision + torch.log1p(curvature / precision).sum())

    best = minimize_scalar(negative, bounds=LOG_PRECISION_BOUNDS, method="bounded", options={"xatol": 1e-4})
    return float(torch.tensor(best.x, dtype=torch.float64).exp())
