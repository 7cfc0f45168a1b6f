"""Polar-decomposed low-rank adaptation: orthonormal factors around a free square core."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import Adapter, grouped_linear, site_linear
from pyrolora.models.adapters.lora import weight_norms
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.sites import Site
from pyrolora.models.stiefel import orthogonality_error, stable_rank, uniform_point
from pyrolora.models.uniform_stiefel import UniformStiefel, stiefel


@dataclass(frozen=True)
class PoLAR(Adapter):
    """Low-rank adapters ``y = W x + (alpha / rank) X Theta Y' x`` with orthonormal X and Y, one triple for each projection.

    Usage::

        BayesianModel(backbone, task, adapter=PoLAR(rank=8, alpha=16), prior=dist.Normal(0., 0.2))

    Sites are ``<kind>.polar_X`` with dims ``(layer, out_feature, rank)`` and ``<kind>.polar_Y`` with dims
    ``(layer, in_feature, rank)``, uniform on the Stiefel manifold unless another prior over it is declared, and
    ``<kind>.polar_theta`` with dims ``(layer, rank, rank_in)``, which takes the declared prior. X and Y start uniform, Theta
    at zero, so the network starts unchanged and the first step moves Theta alone. The change's stable rank is Theta's.

    X and Y are known up to rotations that Theta undoes: compare ``X X'``, not X.

    Source: Lion, Zhang, Li and He, "PoLAR: Polar-Decomposed Low-Rank Adapter Representation", 2025.

    Args:
        rank: columns of X and Y.
        alpha: numerator of the scaling ``alpha / rank``.
        targets: projections to adapt: last parts of module names, one regular expression, or ``"all-linear"``.
        layers: numbers of the blocks to adapt (negative from the last); None for all.
        name: put before the names of the sites, to tell several adapters of one model apart.

    Raises:
        ValueError: the rank is not positive, or alpha not positive.
    """

    by_position: ClassVar = True

    rank: int = field(default=8, metadata={"help": "columns of X and Y"})
    alpha: float = field(default=16.0, metadata={"help": "numerator of the scaling alpha / rank"})
    targets: tuple[str, ...] | str = field(
        default=("q_proj", "v_proj"), metadata={"help": "projections to adapt, as PEFT's target_modules"}
    )
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks to adapt; None for all"})
    name: str = field(default="", metadata={"help": "put before the names of the sites"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"The rank must be at least 1; got {self.rank}. A usual choice is 8.")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive; got {self.alpha}. A usual choice is twice the rank.")

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: a target or layer that the network lacks, or a rank above the smaller side of a matrix.
        """
        sites = []
        for kind, members in find_projections(backbone, self.targets, self.layers).items():
            out_features, in_features = members[0][2].weight.shape
            if self.rank > min(in_features, out_features):
                raise ValueError(
                    f"Rank {self.rank} exceeds the smaller side of {kind} ({in_features} x {out_features}), and no matrix "
                    f"has more orthonormal columns than rows. Choose a rank of at most {min(in_features, out_features)}."
                )
            layers = tuple(number for number, _, _ in members)
            modules = tuple(path for _, path, _ in members)
            label = f"{self.name}.{kind}" if self.name else kind
            count = len(members)
            for factor, shape, dims in (
                ("polar_X", (count, out_features, self.rank), ("layer", "out_feature", "rank")),
                ("polar_theta", (count, self.rank, self.rank), ("layer", "rank", "rank_in")),
                ("polar_Y", (count, in_features, self.rank), ("layer", "in_feature", "rank_in")),
            ):
                keys = tuple(f"base_model.model.{path}.{factor}" for path in modules)
                site = Site(f"{label}.{factor}", torch.Size(shape), dims, modules, keys, layers)
                if factor != "polar_theta":
                    uniform = UniformStiefel(*shape, dtype=backbone.site_dtype, device=backbone.device)
                    site = Site(**{**vars(site), "support": stiefel, "prior": uniform, "linear": False})
                sites.append(site)
        return tuple(sites)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: X and Y uniform, Theta zero."""
        start = {}
        for site in sites:
            if site.prior is None:
                start[site.name] = torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device)
            else:
                start[site.name] = uniform_point(
                    *site.shape, generator=generator, dtype=backbone.site_dtype, device=backbone.device
                )
        return start

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: ``x -> (alpha / rank) X Theta Y' x`` in the sites' own float type."""
        changes: dict[str, Delta] = {}
        for site in sites:
            if site.name.endswith("polar_theta"):
                stem = site.name.removesuffix("theta")
                factors = (draw[f"{stem}X"], draw[site.name], draw[f"{stem}Y"])
                stacks = (
                    stack_entries(value, f"{stem}{part}")
                    for value, part in zip(factors, ("X", "theta", "Y"), strict=True)
                )
                triples = zip(*stacks, site.modules, strict=True)
                scale = self.alpha / self.rank
                changes.update(
                    {path: _PolarDelta(x, core, y, scale, site.name, i) for i, (x, core, y, path) in enumerate(triples)}
                )
        return changes

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: ``ratio |W| / alpha`` for Theta, exactly, whose norm X and Y keep."""
        cores = (site for site in sites if site.prior is None)
        return {site.name: ratio * weight_norms(backbone, site) / self.alpha for site in cores}

    @torch.no_grad()
    def diagnostics(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Adapter.diagnostics`: the largest ``|X'X - I|_F`` of all factors, and the mean stable rank of Theta."""
        errors = torch.cat([orthogonality_error(draw[site.name]) for site in sites if site.prior is not None])
        cores = torch.cat([draw[site.name] for site in sites if site.prior is None])
        figures = torch.stack([errors.max(), stable_rank(cores).mean()]).tolist()
        return dict(zip(("orthogonality_error", "stable_rank"), figures, strict=True))


@dataclass(frozen=True)
class _PolarDelta:
    left: Tensor
    core: Tensor
    right: Tensor
    scale: float
    core_site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        narrow = grouped_linear(rows.to(self.right.dtype), self.right.mT)
        mixed = site_linear(narrow * self.scale, self.core, self.core_site, self.entry)
        return grouped_linear(mixed, self.left).to(rows.dtype)
