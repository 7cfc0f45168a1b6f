"""Prior precisions: read from the declared prior, or chosen by the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from pyrolora.models.priors import Learned
from pyrolora.models.program import BayesianModel

# natural logarithm of the smallest and largest prior precision that a search considers
LOG_PRECISION_BOUNDS = (-4.0, 14.0)


@dataclass(frozen=True)
class NormalPrior:
    """Mean and precision of a Normal prior over one site, both of shapes that broadcast to the site's."""

    mean: Tensor
    precision: Tensor


def declared_prior(model: BayesianModel, names: Sequence[str]) -> dict[str, NormalPrior]:
    """The Normal prior declared for each site, as Laplace needs it.

    Raises:
        ValueError: a prior that is not a fixed or learned Normal; Laplace's precision would not be the declared one.
    """
    found = {}
    for name in names:
        declaration = model.prior.declared[name]
        base = declaration.base_dist if isinstance(declaration, dist.Independent) else declaration
        if isinstance(base, Learned):
            base = dist.Normal(torch.zeros_like(model.prior.scales[name]), model.prior.scales[name])
        if not isinstance(base, dist.Normal):
            raise ValueError(
                f"Laplace needs a Normal prior with fixed or learned scale; {name!r} has "
                f"{model.prior.to_dict()[name]['prior']}. Declare dist.Normal(0., 0.2) there, leave the site out with "
                "sites=, or use SVI, which takes any prior."
            )
        loc, scale = (value.to(model.backbone.device, model.backbone.site_dtype) for value in (base.loc, base.scale))
        found[name] = NormalPrior(loc, scale.square().reciprocal())
    return found


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
        priors: site name -> prior.
        eigenvalues: site name -> eigenvalues or diagonal of the curvature; for eigenvalues of a dense curvature the
            precision must be one number for the site.
    """
    total = log_likelihood
    for name, values in eigenvalues.items():
        precision = priors[name].precision.double()
        misfit = ((estimate[name].double() - priors[name].mean.double()).square() * precision).sum()
        volume = ((values.double().clamp_min(0) + precision).log() - precision.log().expand_as(values)).sum()
        total -= 0.5 * float(misfit + volume)
    return total


def evidence_precision(
    estimate: Mapping[str, Tensor], priors: Mapping[str, NormalPrior], eigenvalues: Mapping[str, Tensor]
) -> dict[str, NormalPrior]:
    """One precision for each site that maximises the evidence, by a bounded search in its logarithm.

    The evidence is a sum over sites, so each site is a one-dimensional problem on cached eigenvalues.
    """
    chosen = {}
    for name, values in eigenvalues.items():
        spread = float((estimate[name].double() - priors[name].mean.double()).square().sum())
        curvature = values.double().clamp_min(0).flatten()

        def negative(log_precision: float, spread: float = spread, curvature: Tensor = curvature) -> float:
            precision = torch.tensor(log_precision, dtype=torch.float64).exp()
            volume = torch.log1p(curvature / precision).sum()
            return 0.5 * float(spread * precision + volume)

        best = minimize_scalar(negative, bounds=LOG_PRECISION_BOUNDS, method="bounded", options={"xatol": 1e-4})
        precision = torch.tensor(best.x).exp().to(priors[name].precision)
        chosen[name] = NormalPrior(priors[name].mean, precision)
    return chosen
