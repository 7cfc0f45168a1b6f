"""Normal priors whose covariance over input features is the inverse of a second moment."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pyrolora.models.moments import SecondMoments
from pyrolora.models.settings import check_numbers
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class Covariance:
    """Normal rows with covariance ``scale^2 (C / mean diag C + damping I)^-1``, C the second moment of the inputs.

    A change that alters the outputs on C's text is improbable in proportion to how much it alters them: the soft form of
    `CorDA`'s knowledge-preserved mode, and the input half of a Kronecker-factored Laplace prior from that text.

    Usage::

        second_moments(backbone, batches, paths).save("knowledge.safetensors")
        BayesianModel(backbone, task, prior={"*.lora_A": Covariance("knowledge.safetensors", 0.05), "*.lora_B": Flat()})

    For sites whose last dimension is the projection's input: A of every low-rank adapter, rows of `S2FT`, `FullRank`.

    Args:
        moments: file of `SecondMoments`.
        scale: standard deviation along a direction in which C has its mean eigenvalue.
        damping: added to C's diagonal, relative to its mean; bounds the scale where the text says nothing.

    Raises:
        ValueError: a scale or damping that is not positive.
    """

    moments: str
    scale: float
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("scale", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"The {name} of a covariance prior must be positive; got {getattr(self, name)}.")

    def distribution(self, site: Site, device: torch.device, dtype: torch.dtype) -> "RowNormal":
        """The prior of one site.

        Raises:
            ValueError: a site whose last dimension is no projection's whole input.
        """
        if not site.modules or site.dims[-1] != "in_feature":
            raise ValueError(
                f"A covariance prior is over input features, and the dims of {site.name!r} are {', '.join(site.dims)}. "
                "Give that site another prior."
            )
        kept = SecondMoments.load(self.moments)
        precisions = []
        for path in site.modules:
            moment = kept[path].double()
            eye = torch.eye(len(moment), dtype=torch.float64)
            precisions.append((moment / moment.diagonal().mean() + self.damping * eye) / self.scale**2)
        root = torch.linalg.cholesky(torch.stack(precisions))
        return RowNormal(root.to(device, dtype), site.shape)


class RowNormal(TorchDistribution):
    """Independent zero-mean Normal rows, one precision matrix for each entry of a stack.

    Args:
        root: lower Cholesky factors of the precisions.
        shape: event shape.

    Shape:
        root ``(entries, in, in)``, shape ``(entries, rows, in)``
    """

    arg_constraints: ClassVar = {}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, root: Tensor, shape: torch.Size) -> None:
        self.root = root
        super().__init__(torch.Size(), shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Zero, of the event shape."""
        return self.root.new_zeros(self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, of the event shape."""
        variance = torch.cholesky_inverse(self.root).diagonal(dim1=-2, dim2=-1)
        return variance[:, None].expand(self.event_shape)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:  # noqa: B008 - immutable
        """Draws, ``(*sample_shape, *event_shape)``."""
        noise = torch.randn(*sample_shape, *self.event_shape, dtype=self.root.dtype, device=self.root.device)
        return torch.linalg.solve_triangular(self.root, noise, upper=False, left=False)

    def misfit(self, value: Tensor) -> Tensor:
        """Squared Mahalanobis norm of each draw, summed over rows and entries."""
        return (value @ self.root).square().sum((-3, -2, -1))

    @property
    def log_determinant(self) -> Tensor:
        """Log determinant of the precision of the whole site."""
        return 2 * self.event_shape[-2] * self.root.diagonal(dim1=-2, dim2=-1).log().sum()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, ``sample_shape``."""
        constant = self.event_shape.numel() * math.log(2 * math.pi)
        return 0.5 * (self.log_determinant - self.misfit(value) - constant)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RowNormal":
        """Only the empty batch shape; draws are asked for through the sample shape."""
        if torch.Size(batch_shape):
            raise NotImplementedError("RowNormal has no batch shape; ask for draws with sample((n,)).")
        return self


@register_kl(dist.Independent, RowNormal)
def _kl_of_a_factorised_normal(q: dist.Independent, p: RowNormal) -> Tensor:
    base = q.base_dist
    if not isinstance(base, dist.Normal) or q.reinterpreted_batch_ndims != len(p.event_shape):
        raise NotImplementedError
    # the diagonal of the precision, by which independent deviations are penalised
    precision = p.root.square().sum(-1)[:, None]
    spread = (base.scale.square() * precision - 2 * base.scale.log() - 1).sum()
    return 0.5 * (spread + p.misfit(base.loc) - p.log_determinant)
