"""From a specification and a model to a guide with parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrolora.guides.base import Family, Guide, GuideSpecification, SeededBy, by_pattern
from pyrolora.guides.point import Point
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import SiteTable


def build_guide(
    specification: GuideSpecification,
    model: BayesianModel,
    *,
    start: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Guide:
    """A guide for every site of a model: ``build_guide({"*.lora_A": BLoB(), "*.lora_B": Point()}, model)``.

    Args:
        specification: a family, or ``{glob pattern: family}``.
        model: the model, asked for its sites and priors only; the backbone does not run.
        start: site name -> where its mean starts, such as another posterior's mean; sites left out start as their
            adapter says, sampled hyper-parameters at a prior draw.
        generator: source of the random part of the start.

    Raises:
        ValueError: an unknown site, a gap or an overlap in the patterns; a start of an unknown site or another shape.
        TypeError: something that is not a family.
    """
    families = resolve(specification, model.sites)
    _check_start(start or {}, model)
    device, dtype = model.backbone.device, model.backbone.site_dtype
    given = {name: value.to(device, dtype) for name, value in (start or {}).items()}
    values = {**model.initial(generator), **given}
    devices = [device] if device.type == "cuda" else []
    # the generator also seeds the prior draws at which sampled hyper-parameters start
    with (
        SeededBy(generator, devices),
        poutine.trace() as traced,
        poutine.condition(data=values),
        torch.no_grad(),
    ):
        model.sample_sites()
    nodes: Any = traced.trace.nodes
    factors = {}
    # a stream of its own for what families draw, so that other families leave the starts of means as they are
    with SeededBy(generator, devices):
        for name, family in families.items():
            node = nodes[name]
            # fused optimisers read memory as it lies, and what a file gives back lies in order
            value = node["value"].detach().contiguous()
            factors[name] = family.factor(model.sites[name], value, node["fn"])
            factors[name].family = family
    return Guide(factors)


def _check_start(start: Mapping[str, Tensor], model: BayesianModel) -> None:
    for name, value in start.items():
        if name not in model.sites:
            raise ValueError(
                f"The start names the site {name!r}, which the model does not have. "
                f"Did you mean {nearest(name, model.sites)!r}? Sites: {', '.join(model.sites)}."
            )
        if value.shape != model.sites[name].shape:
            raise ValueError(
                f"The start of {name!r} has shape {tuple(value.shape)}; the site's is {tuple(model.sites[name].shape)}. "
                "Give one value of every weight, such as another posterior's mean()."
            )


def resolve(specification: GuideSpecification, sites: SiteTable) -> dict[str, Family]:
    """One family for every site, in program order.

    A single family is meant for sites without a prior of their own; those with one, on a manifold say, are points unless a
    pattern names them.

    Args:
        specification: a family, or ``{glob pattern: family}``.
        sites: the model's sites.

    Raises:
        ValueError: an unknown site, a gap or an overlap; the nearest name is offered.
        TypeError: something that is not a family.
    """
    points: dict[str, Family] = {name: Point() for name, site in sites.items() if site.prior is not None}
    families: dict[str, Family] = sites.assign(by_pattern(specification), "guide", points)
    for name, family in families.items():
        support = sites[name].support
        if name in points and support is not constraints.real and not family.fits_manifold(support):
            able = [kind.__name__ for kind in Family.registered.values() if kind.fits_manifold(support)]
            raise ValueError(
                f"{type(family).__name__} is a posterior over real numbers, and {name!r} lives on {sites[name].support}. "
                f"Use {' or '.join(f'{kind}()' for kind in sorted(able))} there, or leave the site out of the patterns."
            )
    for family in by_pattern(specification).values():
        family.check([sites[name] for name, given in families.items() if given is family])
    return families
