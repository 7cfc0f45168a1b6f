"""Posteriors as an `xarray.DataTree` that every version of ArviZ can take."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pyrolora.inference.predictive import log_likelihood
from pyrolora.inference.spectrum import change_spectra
from pyrolora.models.naming import nearest
from pyrolora.models.randomness import seeded
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
    train: Split | EncodedSplit | None = None,
    summaries: bool = False,
    seed: int = 0,
) -> xarray.DataTree:
    """Draws, predictions and training curves with named dims: ``posterior.to_arviz(sites="q_proj.*", draws=200)``.

    ArviZ 1 takes the tree as it is; for ArviZ 0.x use `to_inference_data`. The draws are independent, so there is one chain
    and effective sample sizes say nothing; `combine_chains` puts the fits of several seeds side by side.

    Groups and their variables:

    ========================  =====================================================================================
    ``posterior``             the chosen sites; with ``summaries`` also ``change_norm``, ``effective_rank`` and
                              ``stable_rank`` of the change of each projection, dims ``layer`` and ``projection``
    ``prior``                 the same sites where the prior is a proper fixed distribution
    ``posterior_predictive``  ``probability`` of each class of each example (with ``data``)
    ``log_likelihood``        ``label``, nats, of each example under each draw (with ``data``)
    ``observed_data``         ``label`` (with ``data``)
    ``sample_stats``          ``log_q``, and ``log_prior`` unless a prior is a callable; with ``train`` also ``lp``, the
                              log joint density of weights and training labels; all nats
    ``variational_stats``     one value a training step: ``loss`` (nats an example), ``nll``, ``kl``, ``grad_norm`` and
                              ``elbo`` (nats, of all data, at ``kl_weight`` 1)
    ========================  =====================================================================================

    Attributes of the tree and its groups: ``inference_library``, ``inference_library_version`` and ``sample_dims``; of the
    tree also ``backbone``, ``task``, ``engine``, ``guide``, ``num_data``, ``kl_weight``, ``fit_seed`` and ``draw_seed``.

    Args:
        posterior: what to describe.
        sites: glob pattern or patterns of the sites to include; an empty list for none.
        draws: number of draws.
        data: labelled rows to predict.
        train: the rows that it was fitted to.
        summaries: add the summaries of each layer, which stay small where the weights do not.
        seed: seeds the draws.

    Raises:
        ValueError: a pattern that matches no site, nothing to put into the posterior group, or so many numbers that memory
            would not hold them.
    """
    patterns = [sites] if isinstance(sites, str) else list(sites)
    if not patterns and not summaries:
        raise ValueError("sites: got no pattern, expected one such as 'q_proj.*', or summaries=True.")
    chosen = _choose(posterior, patterns, draws) if patterns else []
    generator = torch.Generator().manual_seed(seed)
    drawn = posterior.sample(draws, generator=generator)
    dims = _dim_names(list(posterior.model.sites.values()), posterior.model.task.labels)
    variables = [_dataset({site.name: drawn[site.name] for site in chosen}, chosen, dims, draws)]
    if summaries:
        variables.append(_change_summaries(posterior, drawn, draws))
    groups = {"posterior": xarray.merge(variables, join="outer")}
    stats = {"log_q": _by_draw(posterior.log_prob(drawn), draws)}
    prior = _prior_draws(posterior, chosen, draws, seed)
    if prior:
        groups["prior"] = _dataset(prior, [site for site in chosen if site.name in prior], dims, draws)
    log_prior = _log_prior(posterior, drawn)
    if log_prior is not None:
        stats["log_prior"] = _by_draw(log_prior, draws)
        if train is not None:
            likelihood = log_likelihood(posterior.model, train, drawn).sum(1)
            stats["lp"] = _by_draw(log_prior.double().cpu() + likelihood, draws)
    groups["sample_stats"] = xarray.Dataset(stats, coords={"chain": [0], "draw": range(draws)})
    if data is not None:
        groups.update(_predictive_groups(posterior, data, draws, seed))
    if history := posterior.record.get("history"):
        groups["variational_stats"] = _training_curves(history, int(posterior.record["num_data"]))
    attributes = _attributes(posterior, seed)
    shared = {key: attributes[key] for key in ("inference_library", "inference_library_version", "sample_dims")}
    tree = xarray.DataTree.from_dict({f"/{name}": group.assign_attrs(shared) for name, group in groups.items()})
    tree.attrs.update(attributes)
    return tree


def combine_chains(trees: Sequence[xarray.DataTree]) -> xarray.DataTree:
    """Trees of several fits as one, a chain each: ``az.rhat(to_inference_data(combine_chains(trees)))``.

    R-hat then says whether independent fits agree. Weights of a product B A are free up to an invertible matrix and will not;
    probabilities, log-likelihoods and the summaries of `to_datatree` should.

    Args:
        trees: of fits under different seeds, made with the same choices.

    Raises:
        ValueError: fewer than two trees, or trees of other shapes.
    """
    trees = list(trees)
    if len(trees) < 2:
        raise ValueError(
            f"trees: got {len(trees)}, expected those of at least two fits. Fit the same model under more seeds."
        )
    groups = {}
    for name, group in trees[0].children.items():
        parts = [tree[name].to_dataset() for tree in trees]
        if "chain" not in group.dims:
            groups[f"/{name}"] = parts[0]
            continue
        try:
            joined = xarray.concat(parts, dim="chain", join="exact", combine_attrs="override")
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"trees: their groups {name!r} do not fit together ({error}); make all of them with the same arguments."
            ) from error
        groups[f"/{name}"] = joined.assign_coords(chain=range(len(trees)))
    # the training curves of one fit say nothing about the others
    groups.pop("/variational_stats", None)
    combined = xarray.DataTree.from_dict(groups)
    combined.attrs.update(trees[0].attrs | {"fit_seed": [int(tree.attrs["fit_seed"]) for tree in trees]})
    return combined


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


def _dim_names(sites: Sequence[Site], labels: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Site -> dim -> labels; a dim that sites have in different sizes or layers gets the later site's name in front.

    Made from all sites of a model, so that a name depends neither on the group nor on the choice of sites.
    """
    first: dict[str, list[Any]] = {}
    found: dict[str, dict[str, list[Any]]] = {}
    for site in sites:
        found[site.name] = {}
        for dim, size in zip(site.dims, site.shape, strict=True):
            coords: list[Any] = list(range(size))
            if dim == "layer" and site.layers:
                coords = list(site.layers)
            elif dim == "class" and size == len(labels):
                coords = list(labels)
            name = dim if first.setdefault(dim, coords) == coords else f"{site.name}_{dim}"
            found[site.name][name] = coords
    return found


def _dataset(
    values: Mapping[str, Tensor], sites: Sequence[Site], dims: Mapping[str, Mapping[str, list[Any]]], draws: int
) -> xarray.Dataset:
    """One variable a site."""
    coords: dict[str, Any] = {}
    variables = {}
    for site in sites:
        coords.update(dims[site.name])
        variables[site.name] = (["chain", "draw", *dims[site.name]], values[site.name].detach().cpu().numpy()[None])
    return xarray.Dataset(variables, coords={"chain": [0], "draw": range(draws), **coords})


def _change_summaries(posterior: "Posterior", drawn: Mapping[str, Tensor], draws: int) -> xarray.Dataset:
    """Norm and ranks of the change of each projection; a layer that lacks a kind of projection holds NaN there."""
    datasets = []
    for spectrum in change_spectra(posterior.model, drawn).values():
        numbers = {
            "change_norm": spectrum.norm, "effective_rank": spectrum.effective_rank, "stable_rank": spectrum.stable_rank,
        }  # fmt: skip
        datasets.append(
            xarray.Dataset(
                {
                    name: (["chain", "draw", "layer", "projection"], value.detach().cpu().numpy()[None, ..., None])
                    for name, value in numbers.items()
                },
                coords={
                    "chain": [0],
                    "draw": range(draws),
                    "layer": list(spectrum.layers),
                    "projection": [spectrum.projection],
                },
            )
        )
    if not datasets:
        raise ValueError("summaries: the adapters of this model change no projection. Choose sites= instead.")
    return xarray.merge(datasets, join="outer", compat="no_conflicts")


def _training_curves(history: Sequence[Mapping[str, float]], num_data: int) -> xarray.Dataset:
    curves = {key: np.array([entry[key] for entry in history]) for key in history[0] if key != "step"}
    if {"nll", "kl"} <= curves.keys():
        curves["elbo"] = -num_data * (curves["nll"] + curves["kl"])
    return xarray.Dataset(
        {key: ("step", values) for key, values in curves.items()}, coords={"step": [entry["step"] for entry in history]}
    )


def _by_draw(values: Tensor, draws: int) -> tuple[list[str], np.ndarray]:
    return ["chain", "draw"], values.expand(draws).double().cpu().numpy()[None]


def _prior_draws(posterior: "Posterior", sites: Sequence[Site], draws: int, seed: int) -> dict[str, Tensor]:
    """Prior draws of the sites whose prior is a proper fixed distribution."""
    prior, found = posterior.model.prior, {}
    with seeded(seed, posterior.model.backbone.device):
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
