"""Posteriors as an `xarray.DataTree` that every version of ArviZ can take."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site
from pyrolora.models.tasks import EncodedSplit, Split

if TYPE_CHECKING:
    from pyrolora.inference.posterior import Posterior

# numbers in the posterior group before a choice of sites is asked for: 1 GiB
MOST_NUMBERS = 2**28


def to_datatree(
    posterior: "Posterior",
    *,
    sites: str | Sequence[str] = "*",
    draws: int = 100,
    data: Split | EncodedSplit | None = None,
    seed: int = 0,
) -> xarray.DataTree:
    """Draws, predictions and training curves with named dims: ``posterior.to_arviz(sites="q_proj.*", draws=200)``.

    Groups: ``posterior`` (the chosen sites), ``prior`` (where it can be sampled), ``posterior_predictive``,
    ``log_likelihood`` and ``observed_data`` (with ``data``), ``sample_stats`` (``log_q`` and, with the training log-prior,
    ``log_prior``), and ``variational_stats`` (one value a step). ArviZ 1 takes the tree as it is; for ArviZ 0.x use
    `to_inference_data`. The draws are independent, so there is one chain and effective sample sizes say nothing.

    Args:
        posterior: what to describe.
        sites: glob pattern or patterns of the sites to include.
        draws: number of draws.
        data: labelled rows to predict.
        seed: seeds the draws.

    Raises:
        ValueError: a pattern that matches no site, or so many numbers that memory would not hold them.
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    chosen = _choose(posterior, patterns, draws)
    generator = torch.Generator().manual_seed(seed)
    drawn = posterior.sample(draws, generator=generator)
    dims = _dim_names(list(posterior.model.sites.values()))
    groups = {"posterior": _dataset({site.name: drawn[site.name] for site in chosen}, chosen, dims)}
    stats = {"log_q": _by_draw(posterior.log_prob(drawn), draws)}
    prior = _prior_draws(posterior, chosen, draws, seed)
    if prior:
        groups["prior"] = _dataset(prior, [site for site in chosen if site.name in prior], dims)
    log_prior = _log_prior(posterior, drawn)
    if log_prior is not None:
        stats["log_prior"] = _by_draw(log_prior, draws)
    groups["sample_stats"] = xarray.Dataset(stats)
    if data is not None:
        groups.update(_predictive_groups(posterior, data, draws, seed))
    if history := posterior.record.get("history"):
        groups["variational_stats"] = xarray.Dataset(
            {key: ("step", np.array([entry[key] for entry in history])) for key in history[0] if key != "step"},
            coords={"step": [entry["step"] for entry in history]},
        )
    tree = xarray.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs.update(_attributes(posterior, seed))
    return tree


def to_inference_data(tree: xarray.DataTree) -> Any:
    """The tree as whatever the installed ArviZ works on: ``az.summary(to_inference_data(tree))``.

    ArviZ 0.x has its own container, ArviZ 1 works on the tree itself.
    """
    import arviz

    return tree if int(version("arviz").split(".")[0]) >= 1 else arviz.from_datatree(tree)


def _choose(posterior: "Posterior", patterns: Sequence[str], draws: int) -> list[Site]:
    table = posterior.model.sites
    chosen = [site for site in table.values() if any(site.matches(pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f"No site matches {list(patterns)}. Did you mean {nearest(patterns[0], table)!r}? Sites: {', '.join(table)}."
        )
    numbers = draws * sum(site.numel for site in chosen)
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"{draws} draws of {len(chosen)} sites are {numbers:,} numbers, more than {MOST_NUMBERS:,}. Choose sites= "
            "or fewer draws."
        )
    return chosen


def _dim_names(sites: Sequence[Site]) -> dict[str, dict[str, list[int]]]:
    """Site -> dim -> labels; a dim that sites have in different sizes or layers gets the later site's name in front.

    Made from all sites of a model, so that a name depends neither on the group nor on the choice of sites.
    """
    first: dict[str, list[int]] = {}
    found: dict[str, dict[str, list[int]]] = {}
    for site in sites:
        found[site.name] = {}
        for dim, size in zip(site.dims, site.shape, strict=True):
            labels = list(site.layers) if dim == "layer" and site.layers else list(range(size))
            name = dim if first.setdefault(dim, labels) == labels else f"{site.name}_{dim}"
            found[site.name][name] = labels
    return found


def _dataset(
    values: Mapping[str, Tensor], sites: Sequence[Site], dims: Mapping[str, Mapping[str, list[int]]]
) -> xarray.Dataset:
    """One variable a site."""
    coords: dict[str, Any] = {}
    variables = {}
    for site in sites:
        coords.update(dims[site.name])
        variables[site.name] = (["chain", "draw", *dims[site.name]], values[site.name].detach().cpu().numpy()[None])
    draws = next(iter(values.values())).shape[0]
    return xarray.Dataset(variables, coords={"chain": [0], "draw": range(draws), **coords})


def _by_draw(values: Tensor, draws: int) -> tuple[list[str], np.ndarray]:
    return ["chain", "draw"], values.expand(draws).double().cpu().numpy()[None]


def _prior_draws(posterior: "Posterior", sites: Sequence[Site], draws: int, seed: int) -> dict[str, Tensor]:
    """Prior draws of the sites whose prior is a proper fixed distribution."""
    prior, found = posterior.model.prior, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for site in sites:
            entry = prior.to_dict().get(site.name)
            if entry is not None and entry["prior"] not in ("Flat", "callable"):
                found[site.name] = prior(site).sample((draws,))
    return found


def _log_prior(posterior: "Posterior", drawn: Mapping[str, Tensor]) -> Tensor | None:
    model = posterior.model
    if any(entry["prior"] == "callable" for entry in model.prior.to_dict().values()):
        return None
    terms = [model.prior(site).log_prob(drawn[name]) for name, site in model.adapter_sites.items()]
    return torch.stack([term.expand(next(iter(drawn.values())).shape[0]) for term in terms]).sum(0)


def _predictive_groups(
    posterior: "Posterior", data: Split | EncodedSplit, draws: int, seed: int
) -> dict[str, xarray.Dataset]:
    # the same draws as in the posterior group, so that log-likelihood and log_q belong together
    kind = "mean" if posterior.is_point else "mc"
    predictive = posterior.predict(data, draws=draws, kind=kind, generator=torch.Generator().manual_seed(seed))
    probs = predictive.probs.expand(draws, -1, -1).numpy()[None]
    labels = list(posterior.model.task.labels)[: probs.shape[-1]]
    rows = range(probs.shape[2])
    coords = {"chain": [0], "draw": range(draws), "example": rows}
    groups = {
        "posterior_predictive": xarray.Dataset(
            {"probability": (["chain", "draw", "example", "class"], probs)}, coords={**coords, "class": labels}
        )
    }
    if predictive.labels is not None:
        likelihood = predictive.log_likelihood.expand(draws, -1).numpy()[None]
        groups["log_likelihood"] = xarray.Dataset({"label": (["chain", "draw", "example"], likelihood)}, coords=coords)
        groups["observed_data"] = xarray.Dataset(
            {"label": ("example", predictive.labels.numpy())}, coords={"example": rows}
        )
    return groups


def _attributes(posterior: "Posterior", seed: int) -> dict[str, Any]:
    model, record = posterior.model, posterior.record
    return {
        "inference_library": "pyrolora",
        "inference_library_version": version("pyrolora"),
        "backbone": model.backbone.name,
        "task": model.task.name,
        "engine": str(record.get("engine")),
        "guide": ", ".join(f"{name}: {factor.family}" for name, factor in posterior.guide.items()),
        "num_data": int(record.get("num_data", model.num_data)),
        "kl_weight": float(record.get("kl_weight", 1.0)),
        "fit_seed": int(record.get("seed") or 0),
        "draw_seed": seed,
        "sample_dims": ["chain", "draw"],
    }
