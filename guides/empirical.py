"""Draws of a sampler as a posterior: the empirical distribution of a site's kept values."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class Empirical(Family):
    """Equal mass on each of a number of draws; what `NUTS` returns. It has no parameters to optimise.

    Args:
        draws: number of draws.

    Raises:
        ValueError: fewer than one draw.
    """

    draws: int = field(default=1000, metadata={"help": "number of draws"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise ValueError(f"An empirical posterior needs at least one draw; got {self.draws}.")

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`; all draws are the start until `EmpiricalFactor.set_draws`."""
        return EmpiricalFactor(start, self.draws)


class EmpiricalDistribution(dist.TorchDistribution):
    """Equal mass on each of some values.

    Args:
        values: ``(draws, *event_shape)``.
    """

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, values: Tensor) -> None:
        self.values = values
        super().__init__(torch.Size(), values.shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of the values."""
        return self.values.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the values."""
        return self.values.var(0, correction=0)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Values chosen with replacement, ``(*sample_shape, *event_shape)``."""
        index = torch.randint(len(self.values), tuple(sample_shape), device=self.values.device)
        return self.values[index]

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the fraction of values that are exactly this one, nats; minus infinity for any other."""
        flat = value.reshape(-1, *self.event_shape)
        counts = torch.stack([(self.values == one).flatten(1).all(1).sum() for one in flat]).to(self.values.dtype)
        return (counts.log() - math.log(len(self.values))).reshape(value.shape[: value.dim() - len(self.event_shape)])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EmpiricalDistribution":
        """Only the empty batch shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("EmpiricalDistribution has no batch shape; ask for draws with sample((n,)).")
        return self


class EmpiricalFactor(Factor):
    """Kept draws, as a buffer."""

    roles: ClassVar = {"values": "scale"}
    values: Tensor

    def __init__(self, start: Tensor, draws: int) -> None:
        super().__init__()
        self.register_buffer("values", start.expand(draws, *start.shape).clone())

    @torch.no_grad()
    def set_draws(self, values: Tensor) -> None:
        """Take over draws, ``(draws, *site.shape)``."""
        self.values.copy_(values)

    def distribution(self) -> EmpiricalDistribution:
        """See `Factor.distribution`."""
        return EmpiricalDistribution(self.values)

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.values.mean(0)

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.values.square().mean(0)
