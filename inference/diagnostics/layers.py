"""Where a posterior learned something: shrinkage, signal to noise and rank, layer by layer."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pyrolora.inference.spectrum import change_spectra
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.inference.posterior import Posterior


@torch.no_grad()
def layer_summary(posterior: "Posterior") -> xarray.Dataset:
    """Posterior against prior for every site and layer: ``layer_summary(posterior)["shrinkage"].sel(site="q_proj.lora_A")``.

    Variables with dims ``site`` and ``layer`` (a layer that a site lacks holds NaN; a site without layers has the layer -1):

    - ``prior_sd``, ``posterior_sd``: root mean variance of a weight; the prior's is NaN where it is improper or a callable
    - ``shrinkage``: ``1 - posterior variance / prior variance``, 0 where the data said nothing, 1 where they said all; NaN
      for points, whose lack of width says nothing about the data
    - ``signal_to_noise``: root mean square of the mean over the posterior's standard deviation; NaN for points

    Variables with dims ``projection`` and ``layer``, of the change at the posterior mean: ``change_norm``,
    ``effective_rank``, ``stable_rank``; see `change_spectra`.

    Args:
        posterior: any posterior.

    Schad, Betancourt and Vasishth 2021, "Toward a principled Bayesian workflow", section 3.3 (shrinkage, there contraction).
    """
    mean = posterior.mean()
    datasets = []
    for name, factor in posterior.guide.items():
        site = posterior.model.sites[name]
        variance = (factor.second_moment() - mean[name].square()).clamp_min(0)
        prior = _prior_variance(posterior, site)
        width = _by_layer(variance, site)
        of_layers = {
            "posterior_sd": width.sqrt(),
            "prior_sd": _by_layer(prior, site).sqrt(),
            "shrinkage": 1 - width / _by_layer(prior, site),
            "signal_to_noise": (_by_layer(mean[name].square(), site) / width).sqrt(),
        }
        if "scale" not in factor.roles.values():
            of_layers |= {key: torch.full_like(width, torch.nan) for key in ("shrinkage", "signal_to_noise")}
        layers = list(site.layers) or [-1]
        datasets.append(
            _dataset({key: values.cpu().numpy() for key, values in of_layers.items()}, "site", name, layers)
        )
    for projection, spectrum in change_spectra(posterior.model, mean).items():
        numbers = {
            "change_norm": spectrum.norm[0].cpu().numpy(),
            "effective_rank": spectrum.effective_rank[0].cpu().numpy(),
            "stable_rank": spectrum.stable_rank[0].cpu().numpy(),
        }
        datasets.append(_dataset(numbers, "projection", projection, list(spectrum.layers)))
    return xarray.merge(datasets, join="outer", compat="no_conflicts")


def _dataset(values: dict[str, Any], dim: str, label: str, layers: list[int]) -> xarray.Dataset:
    return xarray.Dataset(
        {key: ([dim, "layer"], np.asarray(numbers, dtype=np.float64)[None]) for key, numbers in values.items()},
        coords={dim: [label], "layer": layers},
    )


def _by_layer(values: Tensor, site: Site) -> Tensor:
    return values.double().flatten(1).mean(1) if site.layers else values.double().mean()[None]


def _prior_variance(posterior: "Posterior", site: Site) -> Tensor:
    prior = posterior.model.prior
    if site.hyper or prior.to_dict()[site.name]["prior"] in ("Flat", "callable"):
        return torch.full(site.shape, torch.nan, device=posterior.model.backbone.device)
    # a Cauchy has none, and its infinity would make every posterior look fully shrunk
    variance = prior(site).variance.expand(site.shape)
    return torch.where(variance.isfinite(), variance, torch.nan)
