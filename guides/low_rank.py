"""Low-rank plus diagonal Normal posteriors, one covariance for each layer of a site."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyrolora.guides.base import Factor, Family
from pyrolora.guides.mean_field import require_positive, starting_scale
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class LowRank(Family):
    """Normal with covariance ``F F' + diag(d^2)`` for each layer of a site, layers independent.

    Usage::

        SVI(guide={"*.lora_A": LowRank(rank=4), "*.lora_B": Point()})

    The KL to a factorised Normal prior is analytic at O(weights * rank^2); no covariance matrix is formed. What is trained of
    F is ``directions``, with ``F = d * directions / sqrt(weights)``: entries of one make a column as long as d, that is,
    double the variance along it, whatever the prior's scale and the layer's size. So one learning rate suits d and F.

    Source: Ong et al., "Gaussian Variational Approximation with a Factor Covariance Structure", 2018.

    Args:
        rank: number of columns of F.
        init_scale: standard deviation of a weight at the start; None starts at the prior's own. Directions start at random
            with entries of 0.01, so that they can grow either way.

    Raises:
        ValueError: a rank below 1, or ``init_scale`` not positive.
    """

    rank: int = field(default=4, metadata={"help": "number of columns of the covariance factor"})
    init_scale: float | None = field(
        default=None, metadata={"help": "standard deviation of a weight at the start; None for the prior's own"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"The rank of a LowRank guide must be at least 1; got {self.rank}. Try 4.")
        require_positive(self.init_scale)

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`.

        Raises:
            ValueError: a site with constrained support or of fewer than two dimensions, which needs `MeanField`.
        """
        if len(site.shape) < 2:
            raise ValueError(
                f"LowRank needs a site with layers and weights in them; {site.name!r} has shape {tuple(site.shape)}. "
                "Use MeanField there."
            )
        if site.support is not constraints.real:
            raise ValueError(
                f"LowRank needs a site on the real line; {site.name!r} has support {site.support}. Use MeanField there."
            )
        return LowRankFactor(start, starting_scale(self.init_scale, site, start, prior), self.rank)


class LowRankNormal(dist.TorchDistribution):
    """Normal with low-rank plus diagonal covariance over tensors, independent along the first dimension.

    Args:
        loc: mean.
        cov_factor: F, with the weights of one layer flattened.
        cov_diag: d^2, the diagonal part (variance of one weight).

    Shape:
        loc ``(layers, *rest)``, cov_factor ``(layers, prod(rest), rank)``, cov_diag ``(layers, prod(rest))``; the event
        shape is that of loc.
    """

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, cov_factor: Tensor, cov_diag: Tensor) -> None:
        self.loc, self.cov_factor, self.cov_diag = loc, cov_factor, cov_diag
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    @property
    def flat(self) -> dist.LowRankMultivariateNormal:
        """The same distribution over flattened layers, with the layers as its batch shape."""
        return dist.LowRankMultivariateNormal(self.loc.flatten(1), self.cov_factor, self.cov_diag, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean, of the event shape."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        return (self.cov_diag + self.cov_factor.square().sum(-1)).reshape(self.loc.shape)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        shape = torch.Size(sample_shape)
        common = torch.randn(*shape, *self.cov_factor.shape[::2], dtype=self.loc.dtype, device=self.loc.device)
        own = torch.randn(*shape, *self.cov_diag.shape, dtype=self.loc.dtype, device=self.loc.device)
        flat = (self.cov_factor @ common.unsqueeze(-1)).squeeze(-1) + self.cov_diag.sqrt() * own
        return self.loc + flat.reshape(*shape, *self.loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats by the capacitance matrix, ``sample_shape``."""
        return self.flat.log_prob(value.flatten(start_dim=value.dim() - self.loc.dim() + 1)).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over layers."""
        return self.flat.entropy().sum()

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: "LowRankNormal | None" = None
    ) -> "LowRankNormal":
        """Only the empty batch shape; draws are asked for through the sample shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("LowRankNormal has no batch shape; ask for draws with sample((n,)).")
        return self


class LowRankFactor(Factor):
    """Mean, log diagonal scale, and the directions of the covariance factor in units of that scale (see `LowRank`)."""

    roles: ClassVar = {"loc": "loc", "log_diag": "scale", "directions": "scale"}

    def __init__(self, start: Tensor, scale: Tensor, rank: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())
        self.log_diag = nn.Parameter(scale.flatten(1).log())
        # a generator of its own, so that building a guide leaves a user's random state alone
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(*self.log_diag.shape, rank, dtype=torch.float64, generator=source)
        self.directions = nn.Parameter(0.01 * noise.to(scale))

    def distribution(self) -> TorchDistribution:
        """See `Factor.distribution`."""
        scale = self.log_diag.exp()
        factor = (scale / scale.shape[1] ** 0.5)[..., None] * self.directions
        return LowRankNormal(self.loc, factor, scale.square())

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
