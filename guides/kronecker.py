"""Normals whose covariance is diagonal in a Kronecker-factored eigenbasis, one basis for each entry of a site."""

import math
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
class KroneckerNormal(Family):
    """Normal in the eigenbasis of Kronecker factors: the family of a Kronecker-factored Laplace posterior.

    Usage::

        SVI(guide={"*.lora_A": KroneckerNormal(), "*.lora_B": Point()})

    Of an entry of shape ``(out, in)`` the covariance is ``c^2 I`` outside the span of the bases U and V and
    ``(U kron V) diag(s^2) (U kron V)'`` inside it. The bases are buffers: Laplace sets them, SVI learns scales in them
    (starting from the leading coordinate axes, where it is a mean field).

    Args:
        rank: columns of each basis at most; None for full bases.
        init_scale: standard deviation of a weight at the start; None starts at the prior's own.

    Raises:
        ValueError: a rank below 1, or ``init_scale`` not positive.
    """

    rank: int | None = field(default=None, metadata={"help": "columns of each basis at most; None for all"})
    init_scale: float | None = field(
        default=None, metadata={"help": "standard deviation of a weight at the start; None for the prior's own"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"The rank of a KroneckerNormal must be at least 1; got {self.rank}. Try 10, or None for all."
            )
        require_positive(self.init_scale)

    def factor(self, site: Site, start: Tensor, prior: TorchDistribution) -> Factor:
        """See `Family.factor`.

        Raises:
            ValueError: a site that is no matrix or stack of matrices of real numbers.
        """
        if site.support is not constraints.real or len(site.shape) not in (2, 3):
            raise ValueError(
                f"KroneckerNormal needs matrices of real weights; {site.name!r} has shape {tuple(site.shape)} and support "
                f"{site.support}. Use MeanField there."
            )
        scale = float(starting_scale(self.init_scale, site, start, prior).mean())
        return KroneckerFactor(start, scale, self.rank)


class KroneckerDistribution(dist.TorchDistribution):
    """The distribution of `KroneckerNormal`.

    Args:
        loc: mean.
        out_basis: orthonormal columns.
        in_basis: orthonormal columns.
        scale: standard deviation in each pair of directions.
        rest: standard deviation outside the bases' span, one for each entry.

    Shape:
        loc ``(entries, out, in)``, out_basis ``(entries, out, p)``, in_basis ``(entries, in, q)``, scale
        ``(entries, p, q)``, rest ``(entries, 1, 1)``; the event shape is that of ``event``.
    """

    arg_constraints: ClassVar = {}
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor, out_basis: Tensor, in_basis: Tensor, scale: Tensor, rest: Tensor, event: torch.Size
    ) -> None:
        self.loc, self.out_basis, self.in_basis, self.scale, self.rest = loc, out_basis, in_basis, scale, rest
        super().__init__(torch.Size(), event, validate_args=False)

    @property
    def truncated(self) -> bool:
        """Whether some directions lie outside the bases' span."""
        return self.scale[0].numel() < self.loc[0].numel()

    @property
    def mean(self) -> Tensor:
        """Mean, of the event shape."""
        return self.loc.reshape(self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        outside = self.rest.square()
        inside = self.out_basis.square() @ (self.scale.square() - outside) @ self.in_basis.square().mT
        return (outside + inside).reshape(self.event_shape)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Reparameterised draws, ``(*sample_shape, *event_shape)``."""
        shape = torch.Size(sample_shape)
        noise = torch.randn(*shape, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        rotated = rotate(noise, self.out_basis, self.in_basis)
        change = rotate(rotated * (self.scale - self.rest), self.out_basis.mT, self.in_basis.mT)
        return (self.loc + self.rest * noise + change).reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``."""
        away = value.reshape(*value.shape[: value.dim() - len(self.event_shape)], *self.loc.shape) - self.loc
        rotated = rotate(away, self.out_basis, self.in_basis)
        outside = self.rest.square().reciprocal()
        misfit = (away.square() * outside).sum((-3, -2, -1))
        misfit = misfit + (rotated.square() * (self.scale.square().reciprocal() - outside)).sum((-3, -2, -1))
        return -0.5 * misfit - self._log_volume() - 0.5 * self.loc.numel() * math.log(2 * math.pi)

    def _log_volume(self) -> Tensor:
        inside = self.scale[0].numel()
        outside = self.loc[0].numel() - inside
        return self.scale.log().sum() + outside * self.rest.log().sum()

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        return self._log_volume() + 0.5 * self.loc.numel() * (1 + math.log(2 * math.pi))

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: "KroneckerDistribution | None" = None
    ) -> "KroneckerDistribution":
        """Only the empty batch shape; draws are asked for through the sample shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("KroneckerDistribution has no batch shape; ask for draws with sample((n,)).")
        return self


def rotate(stack: Tensor, out_basis: Tensor, in_basis: Tensor) -> Tensor:
    """``U' W V`` for every matrix of a stack, as two batched products whatever the leading dimensions.

    Shape:
        stack ``(*leading, entries, out, in)``, out_basis ``(entries, out, p)``, in_basis ``(entries, in, q)``; returns
        ``(*leading, entries, p, q)``
    """
    # a broadcast matmul would copy the bases for every matrix
    narrow = torch.einsum("...eoi,eiq->...eoq", stack, in_basis)
    return torch.einsum("...eoq,eop->...epq", narrow, out_basis)


class KroneckerFactor(Factor):
    """Mean and log scales as parameters, bases as buffers."""

    roles: ClassVar = {"loc": "loc", "log_scale": "scale", "log_rest": "scale"}
    out_basis: Tensor
    in_basis: Tensor

    def __init__(self, start: Tensor, scale: float, rank: int | None) -> None:
        super().__init__()
        self.event = start.shape
        stack = start if start.dim() == 3 else start[None]
        entries, out_features, in_features = stack.shape
        out_kept, in_kept = (side if rank is None else min(rank, side) for side in (out_features, in_features))
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(stack.new_full((entries, out_kept, in_kept), scale).log())
        self.log_rest = nn.Parameter(stack.new_full((entries, 1, 1), scale).log())
        for name, side, kept in (("out_basis", out_features, out_kept), ("in_basis", in_features, in_kept)):
            basis = torch.eye(side, kept, dtype=start.dtype, device=start.device)
            self.register_buffer(name, basis.expand(entries, -1, -1).clone())

    @torch.no_grad()
    def set_basis(self, out_basis: Tensor, in_basis: Tensor, scale: Tensor, rest: Tensor) -> None:
        """Take over bases and standard deviations; shapes as in `KroneckerDistribution`."""
        self.out_basis.copy_(out_basis)
        self.in_basis.copy_(in_basis)
        self.log_scale.copy_(scale.log())
        self.log_rest.copy_(rest.log())

    def distribution(self) -> KroneckerDistribution:
        """See `Factor.distribution`."""
        stack = self.loc if self.loc.dim() == 3 else self.loc[None]
        return KroneckerDistribution(
            stack, self.out_basis, self.in_basis, self.log_scale.exp(), self.log_rest.exp(), self.event
        )

    def mean(self) -> Tensor:
        """See `Factor.mean`."""
        return self.loc

    def second_moment(self) -> Tensor:
        """See `Factor.second_moment`."""
        return self.loc.square() + self.distribution().variance
