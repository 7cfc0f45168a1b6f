"""The constraint of orthonormal columns, and the uniform distribution under it."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora.models.stiefel import orthogonality_error, uniform_point

# a float32 point of rank 256 is this far off by rounding alone
TOLERANCE = 1e-3


class Stiefel(constraints.Constraint):
    """Matrices whose columns are orthonormal, entry by entry of a stack."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        """Whether each matrix is on the manifold, ``(...)``."""
        return orthogonality_error(value) < TOLERANCE

    def __repr__(self) -> str:
        return "Stiefel()"


stiefel = Stiefel()


class UniformStiefel(dist.TorchDistribution):
    """Uniform (Haar) distribution over matrices with orthonormal columns, independent along leading dimensions.

    Usage::

        pyro.sample("q_proj.polar_X", UniformStiefel(30, 576, 8))

    Densities are with respect to this distribution itself, the invariant probability measure: its own is one everywhere.

    Source: Chikuse, "Statistics on Special Manifolds", 2003, section 1.4.

    Args:
        shape: ``(..., rows, rank)``; all of it is the event.
        dtype: type of the draws.
        device: where the draws live.

    Raises:
        ValueError: more columns than rows.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own declaration
    support = stiefel
    has_rsample = False

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        if len(shape) < 2 or shape[-1] > shape[-2]:
            raise ValueError(
                f"{tuple(shape)} holds no matrices with orthonormal columns; expected (..., rows, rank) with a rank of at "
                "most the rows."
            )
        self.dtype, self.device = dtype, torch.device(device)
        super().__init__(torch.Size(), torch.Size(shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Zero: every matrix is as probable as its negative."""
        return torch.zeros(self.event_shape, dtype=self.dtype, device=self.device)

    @property
    def variance(self) -> Tensor:
        """Of every entry ``1 / rows``, since a column has unit length."""
        return torch.full_like(self.mean, 1 / self.event_shape[-2])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Independent draws, ``(*sample_shape, *event_shape)``."""
        return uniform_point(*sample_shape, *self.event_shape, dtype=self.dtype, device=self.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, ``sample_shape``: a uniform prior pulls nowhere."""
        return value.new_zeros(value.shape[: value.dim() - len(self.event_shape)])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "UniformStiefel":
        """Only the empty batch shape; draws are asked for through the sample shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("UniformStiefel has no batch shape; ask for draws with sample((n,)).")
        return self
