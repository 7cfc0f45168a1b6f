"""Sites: the named tensors that a prior is declared over and a guide is built for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch.distributions import constraints

from pyrolora.models.naming import nearest

Value = TypeVar("Value")


@dataclass(frozen=True)
class Site:
    """One `pyro.sample` statement: a stack of one factor over all layers that have it.

    Attributes:
        name: the Pyro name, such as ``"q_proj.lora_A"``.
        shape: event shape, such as ``(layers, rank, in_features)``.
        dims: a name for each dimension, used as xarray dims, such as ``("layer", "rank", "in_feature")``.
        modules: path of the projection that each entry of the first dimension changes; empty for other sites.
        keys: PEFT state-dict key of each entry of the first dimension, without the adapter's name.
        layers: number of the transformer block of each entry of the first dimension.
        support: constraint that a value satisfies.
        hyper: whether a prior samples it, rather than an adapter.
        prior: of a site on a manifold, or one that is no belief about a network (a projector), the prior that it has unless
            another one over its support is declared; such a site is a point unless a pattern gives it a guide.
        linear: whether every entry acts as the weight of one linear map and nothing else, which linearised predictions,
            curvature and noise for each token need; a model takes it away where a row has several networks.
        transient: whether it leaves the likelihood before training ends, as a router that fades does; Laplace then keeps it
            at the estimate unless it is named.
    """

    name: str
    shape: torch.Size
    dims: tuple[str, ...]
    modules: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    support: constraints.Constraint = field(default=constraints.real, compare=False)
    hyper: bool = False
    prior: TorchDistribution | None = field(default=None, compare=False)
    linear: bool = True
    transient: bool = False

    @property
    def numel(self) -> int:
        """Number of scalar weights in the site."""
        return math.prod(self.shape)

    def matches(self, pattern: str) -> bool:
        """Whether the name matches a glob pattern, case-sensitively."""
        return fnmatchcase(self.name, pattern)


class SiteTable(Mapping[str, Site]):
    """The sites of a model in the order in which the Pyro program samples them.

    Usage::

        model.sites["q_proj.lora_A"].shape
        [site.name for site in model.sites.matching("*.lora_A")]

    Args:
        sites: the sites, in program order.

    Raises:
        ValueError: two sites share a name.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = {site.name: site for site in sites}
        if len(self._sites) != len(sites):
            names = [site.name for site in sites]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"Two sites are named {twice!r}; give one of the adapters other targets.")

    def __getitem__(self, name: str) -> Site:
        """The site called ``name``.

        Raises:
            KeyError: no such site; the nearest name is offered.
        """
        try:
            return self._sites[name]
        except KeyError:
            raise KeyError(f"No site {name!r}. Did you mean {nearest(name, self._sites)!r}?") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def matching(self, pattern: str) -> list[Site]:
        """Sites whose name matches a glob pattern, case-sensitively; possibly none."""
        return [site for site in self._sites.values() if site.matches(pattern)]

    def assign(
        self, patterns: Mapping[str, Value], what: str, defaults: Mapping[str, Value] | None = None
    ) -> dict[str, Value]:
        """Give every site exactly one value of a ``{glob pattern: value}`` mapping.

        Args:
            patterns: the mapping, such as ``{"*.lora_A": Normal(0, 1), "*.lora_B": Flat()}``; a pattern
                that matches sites with and without a default is meant for those without.
            what: what is being assigned ("prior", "guide"), for the error message.
            defaults: site name -> value of a site that no pattern needs to match.

        Returns:
            Site name -> value, in site order.

        Raises:
            ValueError: a pattern matches no site, two patterns match one site, or a site is left without a value.
        """
        assigned: dict[str, tuple[str, Value]] = {}
        defaults = defaults or {}
        for pattern, value in patterns.items():
            matched = self.matching(pattern)
            # what also matches ordinary sites is meant for those
            matched = [site for site in matched if site.name not in defaults] or matched
            if not matched:
                raise ValueError(
                    f"The {what} pattern {pattern!r} matches no site. Did you mean {nearest(pattern, self)!r}? "
                    f"Sites: {', '.join(self)}."
                )
            for site in matched:
                if site.name in assigned:
                    raise ValueError(
                        f"The site {site.name!r} matches two {what} patterns, {assigned[site.name][0]!r} and "
                        f"{pattern!r}. Make one of them narrower."
                    )
                assigned[site.name] = (pattern, value)
        assigned = {**{name: ("", value) for name, value in defaults.items()}, **assigned}
        missing = [name for name in self if name not in assigned]
        if missing:
            near = nearest(missing[0], patterns)
            raise ValueError(
                f"No {what} for the site {missing[0]!r}"
                + (f" (nearest pattern: {near!r})" if near else "")
                + f". Add a pattern that matches it; sites without one: {', '.join(missing)}."
            )
        return {name: assigned[name][1] for name in self}
