"""Bayesian low-rank adaptation by backpropagation: a Normal on A, a point on B."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.mean_field import IndependentNormalFactor, MeanField, require_positive, starting_scale
from pyrolora.guides.point import PointFactor
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

VARIANTS = ("elbo", "release")
# the released eps: where G, the root of the standard deviation, starts at most
RELEASED_ROOT = 0.05


@dataclass(frozen=True)
class BLoB(Family):
    """A is Normal(M, G^2) with G^2 the standard deviation of each weight, every other factor a point.

    Usage::

        posterior = SVI(guide=BLoB(), kl_weight=0.1).fit(model, task.train)

    Used for all sites it makes ``*.lora_A`` Bayesian, gives sites that a hierarchical prior sampled a mean-field
    posterior, and keeps the rest as points; by pattern it makes the matched sites Normal, as in
    ``{"v_proj.lora_*": BLoB(sites="*"), ...}``.

    The released code starts G in [eps / sqrt 2, eps] and stops before it converges, so its width depends on the
    schedule. Here the standard deviation starts at the prior's own and is an optimum of the ELBO, unless
    ``variant="release"`` asks for the released start, which `ReleasedBLoB` needs.

    Source: Wang et al., "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models", 2024.

    Args:
        init_scale: standard deviation of a weight at the start; None starts at the prior's own.
        sites: glob pattern of the sites that are Bayesian.
        variant: ``"elbo"``, or ``"release"`` for G uniform in [eps / sqrt 2, eps] with eps = 0.05.

    Raises:
        ValueError: ``init_scale`` is not positive or meets a released start, or an unknown variant.
    """

    init_scale: float | None = field(
        default=None, metadata={"help": "standard deviation of a weight at the start; None for the prior's own"}
    )
    sites: str = field(default="*lora_A", metadata={"help": "glob pattern of the Bayesian sites"})
    variant: str = field(default="elbo", metadata={"help": "'elbo' or 'release'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self.init_scale)
        if self.variant not in VARIANTS:
            raise ValueError(
                f"Unknown variant {self.variant!r} of BLoB. Did you mean {nearest(self.variant, VARIANTS)!r}? "
                f"Variants: {', '.join(VARIANTS)}."
            )
        if self.variant == "release" and self.init_scale is not None:
            raise ValueError(f"The released start has no init_scale; got {self.init_scale}. Leave it out.")

    def check(self, sites: Sequence[Site]) -> None:
        """See `Family.check`.

        Raises:
            ValueError: no site matches ``sites``, so that everything would be a point.
        """
        if not any(site.matches(self.sites) for site in sites):
            raise ValueError(
                f"BLoB makes sites that match {self.sites!r} Bayesian, and none of {', '.join(s.name for s in sites)} does. "
                "Give it LoRA sites, or name the sites, as in BLoB(sites='head.weight')."
            )

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`."""
        if site.matches(self.sites) and self.variant == "release":
            low = RELEASED_ROOT / math.sqrt(2)
            # from torch's state, which `build_guide` seeds
            root = low + (RELEASED_ROOT - low) * torch.rand(start.shape, dtype=torch.float64)
            return SquaredScaleFactor(start, root.square().to(start))
        if site.matches(self.sites):
            return SquaredScaleFactor(start, starting_scale(self.init_scale, site, start, prior))
        return MeanField().factor(site, start, prior) if site.hyper else PointFactor(site, start)


class SquaredScaleFactor(IndependentNormalFactor):
    """Normal(loc, root_scale^2) for each weight; ``root_scale`` is the paper's G, ``loc`` its M."""

    roles: ClassVar = {"loc": "loc", "root_scale": "scale"}

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.root_scale = nn.Parameter(scale.sqrt())

    @property
    def scale(self) -> Tensor:
        """Standard deviation of each weight."""
        return self.root_scale.square()

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """See `IndependentNormalFactor.set_scale`."""
        self.root_scale.copy_(scale.sqrt())

    def log_scale_gradient(self) -> Tensor | None:
        """See `IndependentNormalFactor.log_scale_gradient`."""
        gradient = self.root_scale.grad
        return None if gradient is None else gradient * self.root_scale.detach() / 2
