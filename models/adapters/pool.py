"""A pool of low-rank adapters that share one residual, merged by their products."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.models.adapters.centred import start_names, up_name
from pyrolora.models.adapters.gated import over_rank
from pyrolora.models.adapters.pissa import PiSSA
from pyrolora.models.backbones import Backbone
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration


@dataclass(frozen=True)
class LoRAPool(PiSSA):
    """``y = (W - s B0 A0) x + s sum_i zeta_i B_i A_i x``: members with one start, weighted by a point of the simplex.

    Usage::

        pool = LoRAPool(members=4, rank=8, targets="all-linear")
        deltas = model.deltas({**draw, "pool.weights": torch.tensor([0.6, 0.4, 0.0, 0.0])})

    Every member starts at the same principal components (A0, B0) of the frozen weight, and the sites are changes from there,
    as in `PiSSA`; they lie side by side along the rank, member by member, so one pair of products serves all members and no
    member's product is formed. Products are merged, never factors: the mean of factors is another matrix. Because the
    weights sum to one, members that are alike are the frozen network whatever the weights, without rounding.

    ``pool.weights`` is a constant (equal weights) that a draw may override, one row of weights for each of equal runs of
    rows; with ``concentration`` it is a site with a symmetric Dirichlet prior. A member alone is a `PiSSA` of the same rank,
    so members can be fitted one at a time and put together; see `pyrolora.inference.pool`.

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, equations 2 and 8.

    Args:
        rank: rank of each member.
        alpha: numerator of the scaling ``alpha / rank``; None for the rank, a scaling of 1 as published.
        targets: see `LoRA`.
        layers: see `LoRA`.
        name: see `LoRA`.
        members: number of members.
        concentration: of each weight's Dirichlet prior; None keeps the weights constant.

    Raises:
        ValueError: no member, a concentration that is not positive, or what `PiSSA` refuses.
    """

    members: int = field(default=4, metadata={"help": "number of members"})
    concentration: float | None = field(
        default=None, metadata={"help": "of each weight's Dirichlet prior; None for constant weights"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 1:
            raise ValueError(f"A pool needs at least one member; got {self.members}. The published pool has 4.")
        if self.concentration is not None and not self.concentration > 0:
            raise ValueError(
                f"The concentration of a Dirichlet prior must be positive; got {self.concentration}. Try 1."
            )
        if self.concentration is not None and self.members == 1:
            raise ValueError("The weight of a single member is 1, so it has no prior. Leave concentration out.")
        if self.form != "difference":
            raise ValueError(
                f"A pool changes both factors of every member, and form={self.form!r} does not; leave form out."
            )

    @property
    def weights_name(self) -> str:
        """Name of the merge weights: a site, or a constant."""
        return f"{self.name}.pool.weights" if self.name else "pool.weights"

    @property
    def member(self) -> PiSSA:
        """The adapter of one member, whose sites are slices of the pool's along the rank."""
        return PiSSA(
            rank=self.rank, alpha=self.alpha, targets=self.targets, layers=self.layers, name=self.name,
            iterations=self.iterations, seed=self.seed,
        )  # fmt: skip

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `LoRA.sites`: ``rank`` of the members side by side, and the weights where they have a prior."""
        widened = []
        for site in super().sites(backbone, classes):
            shape = [
                length * self.members if dim == "rank" else length
                for length, dim in zip(site.shape, site.dims, strict=True)
            ]
            widened.append(replace(site, shape=torch.Size(shape)))
        if self.concentration is not None:
            equal = torch.full(
                (self.members,), self.concentration, dtype=backbone.site_dtype, device=backbone.device
            )  # fmt: skip
            prior = dist.Dirichlet(equal, validate_args=False)
            widened.append(
                Site(
                    self.weights_name, torch.Size([self.members]), ("member",), support=prior.support, prior=prior,
                    linear=False,
                )
            )  # fmt: skip
        return tuple(widened)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: no change, and equal weights."""
        start = super().initial(backbone, sites, generator)
        return {name: self._equal(value) if name == self.weights_name else value for name, value in start.items()}

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `CentredLowRank.constants`; also equal weights, where they have no prior."""
        found = super().constants(backbone, sites, calibration)
        if self.concentration is None:
            found[self.weights_name] = self._equal(
                torch.empty(self.members, dtype=backbone.site_dtype, device=backbone.device)
            )
        return found

    def _equal(self, like: Tensor) -> Tensor:
        return torch.full_like(like, 1 / self.members)

    def rank_gate(self, draw: Mapping[str, Tensor]) -> Tensor:
        """The members' weights over the rank.

        Raises:
            ValueError: another number of weights than members.
        """
        weights = draw[self.weights_name]
        if weights.shape[-1] != self.members:
            raise ValueError(
                f"{self.weights_name} holds {weights.shape[-1]} weights for {self.members} members; give one each."
            )
        return over_rank(weights, self.members * self.rank)

    def centres(self, sites: Sequence[Site], constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Adapter.centres`: one start for all members."""
        return {name: self._for_members(name, start) for name, start in super().centres(sites, constants).items()}

    def _for_members(self, name: str, value: Tensor) -> Tensor:
        """A member's values side by side along the rank, once for each member."""
        return value.repeat(1, self.members, 1) if name.endswith("lora_A") else value.repeat(1, 1, self.members)

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `CentredLowRank.relative_scales`: of every member alone; a merge has ``sum_i zeta_i^2`` times the variance."""
        scales = super().relative_scales(backbone, sites, constants, ratio)
        return {name: self._for_members(name, scale) for name, scale in scales.items()}

    def as_lora(
        self, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same change as a product on W, ``s [zeta_1 B_1, ..., zeta_P B_P, -B0] [A_1; ...; A_P; A0]``.

        Its rank is ``(members + 1) rank``; see `CentredLowRank.as_lora`.
        """
        gate = self.rank_gate({**constants, **draw})
        converted = {}
        for site in sites:
            if not site.name.endswith("lora_A"):
                continue
            down, up = draw[site.name], draw[up_name(site)]
            a0, b0 = (
                start.expand(*down.shape[:-2], *start.shape[-2:])
                for start in (constants[name] for name in start_names(site))
            )
            members = [1] * (down.dim() - 2)
            whole = gate.reshape(*gate.shape[:-1], *[1] * (up.dim() - gate.dim()), gate.shape[-1])
            converted[site.name] = torch.cat([down + a0.repeat(*members, self.members, 1), a0], dim=-2)
            merged = (up + b0.repeat(*members, 1, self.members)) * whole
            converted[up_name(site)] = torch.cat([merged, -b0], dim=-1)
        return converted

    @property
    def peft_rank(self) -> int:
        """See `CentredLowRank.peft_rank`: every member's, and the start's that is taken off."""
        return self.rank * (self.members + 1)
