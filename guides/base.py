"""Guides built from a site table, and the families they are made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyrolora.models.naming import nearest
from pyrolora.models.randomness import seeded
from pyrolora.models.settings import check_numbers
from pyrolora.models.sites import Site

ROLES = ("loc", "scale", "point", "manifold")


class Factor(nn.Module, ABC):
    """The posterior of one site: parameters that exist at once, and the distribution that they make.

    Attributes:
        roles: parameter name -> ``"loc"``, ``"scale"``, ``"point"``, or ``"manifold"`` for a value with orthonormal columns,
            by which an engine sets learning rates and steps.
        family: the family that made it, set by `build_guide` and kept with saved posteriors.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    family: "Family"

    @abstractmethod
    def distribution(self) -> TorchDistribution:
        """The posterior of the site; its event shape is the site's shape."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the posterior, of the site's shape (for a constrained site, the image of the unconstrained mean)."""

    @abstractmethod
    def second_moment(self) -> Tensor:
        """E_q[w^2] of every weight, of the site's shape."""


@dataclass(frozen=True)
class Family(ABC):
    """A shape of posterior, chosen before any model is known; `factor` makes it for one site.

    A subclass is a frozen dataclass of hyper-parameters.
    """

    registered: ClassVar[dict[str, type["Family"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Family.registered[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Refuse hyper-parameters that are no such numbers; see `check_numbers`."""
        check_numbers(self)

    @classmethod
    def fits_manifold(cls, support: constraints.Constraint) -> bool:
        """Whether it can be the posterior of a site that has a prior of its own over this support."""
        return False

    @abstractmethod
    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """The posterior of one site before fitting.

        Args:
            site: the site.
            start: where its mean starts.
            prior: its prior, whose scale a family may start from.

        Shape:
            start has the site's shape.
        """

    def check(self, sites: Sequence[Site]) -> None:  # noqa: B027 - most families fit any set of sites
        """Refuse a set of sites on which the family as a whole would not do what its name says.

        Args:
            sites: all sites that this family was given.
        """

    def to_dict(self) -> dict[str, Any]:
        """Hyper-parameters and the family's name under ``"family"``, ready for JSON."""
        return {"family": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> "Family":
        """Rebuild a family from `to_dict`.

        Raises:
            ValueError: an unknown family or hyper-parameter; the nearest valid name is offered.
        """
        settings = dict(settings)
        name = settings.pop("family", None)
        if name not in Family.registered:
            raise ValueError(
                f"Unknown guide {name!r}. Did you mean {nearest(str(name), Family.registered)!r}? "
                f"Guides: {', '.join(sorted(Family.registered))}."
            )
        kind = Family.registered[name]
        valid = [field.name for field in fields(kind)]
        for key in settings:
            if key not in valid:
                raise ValueError(f"{name} has no setting {key!r}. Did you mean {nearest(key, valid)!r}?")
        return kind(**settings)


GuideSpecification: TypeAlias = Family | Mapping[str, Family]


class Guide(PyroModule):
    """A factorised posterior over the sites of a model: one `Factor` a site, sampled in program order.

    Usage::

        guide = build_guide(BLoB(), model)
        TraceMeanField_ELBO().loss_and_grads(model, guide, batch)
        guide.sample(10)["q_proj.lora_A"].shape        # (10, layers, rank, in)

    It holds no reference to the model, so ``copy.deepcopy`` and ``state_dict`` work. Its parameters are plain
    ``nn.Parameter`` objects that exist after construction; no global parameter store is used.

    Args:
        factors: site name -> factor, in program order.
    """

    def __init__(self, factors: Mapping[str, Factor]) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()
            # a site's dots would nest modules: factors are kept in a list, names beside it
            self.site_names = tuple(factors)
            self.factors = nn.ModuleList(factors.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide as a Pyro program with module-local parameters."""
        with pyro.settings.context(module_local_params=True):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; takes whatever the model takes and ignores it."""
        factors: Any = self.factors
        return {
            name: pyro.sample(name, factor.distribution())
            for name, factor in zip(self.site_names, factors, strict=True)
        }

    def items(self) -> Iterator[tuple[str, Factor]]:
        """Site names and their factors, in program order."""
        return zip(self.site_names, self.factors, strict=True)  # type: ignore[arg-type]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guide":
        """An independent copy; the original stays usable."""
        import copy

        return type(self)({name: copy.deepcopy(factor, memo) for name, factor in self.items()})

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site."""
        return {name: factor.mean().detach() for name, factor in self.items()}

    @torch.no_grad()
    def sample(
        self, draws: int, generator: torch.Generator | None = None, sampler: str = "independent"
    ) -> dict[str, Tensor]:
        """Coherent draws of all sites, the same ones under the same generator state.

        Args:
            draws: how many.
            generator: a CPU generator that seeds them; None draws from torch's global state.
            sampler: ``"independent"``, ``"antithetic"`` or ``"stratified"``; see `pyrolora.guides.samplers.draws_of`.

        Shape:
            site name -> ``(draws, *site.shape)``
        """
        # the samplers know the distributions of the families, which are built on this module
        from pyrolora.guides.samplers import draws_of, require_sampler

        require_sampler(sampler)
        with SeededBy(generator, self.devices()):
            # a view of a point's parameter asks for gradients even when it is made without them
            return {name: draws_of(factor.distribution(), draws, sampler).detach() for name, factor in self.items()}

    @torch.no_grad()
    def log_prob(self, draw: Mapping[str, Tensor]) -> Tensor:
        """Log density of draws in nats, summed over sites.

        Shape:
            ``(draws,)`` from site values ``(draws, *site.shape)``
        """
        total: Tensor | None = None
        for name, factor in self.items():
            term = factor.distribution().log_prob(draw[name])
            total = term if total is None else total + term
        return torch.zeros(()) if total is None else total

    @torch.no_grad()
    def second_moments(self, sites: Iterable[str] | None = None) -> dict[str, Tensor]:
        """E_q[w^2] of every weight, as learned priors need it; by default of all sites.

        Shape:
            site name -> the site's shape
        """
        wanted = set(self.site_names if sites is None else sites)
        return {name: factor.second_moment() for name, factor in self.items() if name in wanted}

    def parameters_by_role(self) -> dict[str, list[nn.Parameter]]:
        """Parameters grouped into ``loc``, ``scale``, ``point`` and ``manifold``."""
        groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
        for _, factor in self.items():
            for name, parameter in factor.named_parameters():
                groups[factor.roles[name]].append(parameter)
        return groups

    def devices(self) -> list[torch.device]:
        """GPUs that hold parameters, whose random state draws come from."""
        return sorted({p.device for p in self.parameters() if p.device.type == "cuda"}, key=str)


class SeededBy:
    """Draw from torch's global state as if it were the given generator, and leave both as a user expects.

    ``torch.distributions`` takes no generator: one number drawn from the generator seeds a forked global state.
    """

    def __init__(self, generator: torch.Generator | None, devices: list[torch.device]) -> None:
        self.generator = generator
        self.device = devices[0] if devices else torch.device("cpu")

    def __enter__(self) -> None:
        """Fork and seed."""
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator))
            self._scope = seeded(seed, self.device)
            self._scope.__enter__()

    def __exit__(self, *details: Any) -> None:
        """Restore the global state."""
        if self.generator is not None:
            self._scope.__exit__(*details)


def by_pattern(specification: GuideSpecification) -> Mapping[str, Family]:
    """A specification as ``{glob pattern: family}``.

    Raises:
        TypeError: something that is not a family.
    """
    patterns = specification if isinstance(specification, Mapping) else {"*": specification}
    for pattern, family in patterns.items():
        if not isinstance(family, Family):
            got = f"class {family.__name__}" if isinstance(family, type) else type(family).__name__
            raise TypeError(
                f"The guide of {pattern!r} is a {got}; expected one of "
                f"{', '.join(sorted(Family.registered))}, as in BLoB() (an instance, not the class)."
            )
    return patterns
