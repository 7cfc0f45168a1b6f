"""From a specification and a model to a guide with parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrolora.guides.base import Guide, GuideSpecification, resolve
from pyrolora.models.program import BayesianModel


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
        ValueError: an unknown site, a gap or an overlap in the patterns.
        TypeError: something that is not a family.
    """
    families = resolve(specification, model.sites)
    values = {**model.initial(generator), **(start or {})}
    with poutine.trace() as traced, poutine.condition(data=values), torch.no_grad():
        model.sample_sites()
    nodes: Any = traced.trace.nodes
    factors = {}
    for name, family in families.items():
        node = nodes[name]
        factors[name] = family.factor(model.sites[name], node["value"].detach(), node["fn"])
        factors[name].family = family
    return Guide(factors)
