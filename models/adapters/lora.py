"""Low-rank adaptation with stacked factors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.models.adapters.base import Adapter, site_linear
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank adapters, ``y = W x + (alpha / rank) B A x``, one pair of sites for each kind of projection.

    Usage::

        BayesianModel(backbone, task, adapter=LoRA(rank=8, alpha=16, targets=["q_proj", "v_proj"]))

    Sites are ``<kind>.lora_A`` with dims ``(layer, rank, in_feature)`` and ``<kind>.lora_B`` with dims
    ``(layer, out_feature, rank)``. Start and scaling are PEFT's: A uniform in +-1/sqrt(in), B zero.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.

    Args:
        rank: inner dimension of the product.
        alpha: numerator of the scaling ``alpha / rank``.
        targets: projections to adapt: last parts of module names, one regular expression, or ``"all-linear"``.
        layers: numbers of the blocks to adapt (negative from the last); None for all.
        name: put before the names of the sites, as in ``top.q_proj.lora_A``, to tell several LoRAs of one model apart.

    Raises:
        ValueError: the rank is not positive, or alpha not positive.
    """

    rank: int = field(default=8, metadata={"help": "inner dimension of the product B A"})
    alpha: float = field(default=16.0, metadata={"help": "numerator of the scaling alpha / rank"})
    targets: tuple[str, ...] | str = field(
        default=("q_proj", "v_proj"), metadata={"help": "projections to adapt, as PEFT's target_modules"}
    )
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks to adapt; None for all"})
    name: str = field(default="", metadata={"help": "put before the names of the sites"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"The rank must be at least 1; got {self.rank}. A usual choice is 8.")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive; got {self.alpha}. A usual choice is twice the rank.")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

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
                    f"Rank {self.rank} exceeds the smaller side of {kind} ({in_features} x {out_features}). "
                    f"Choose a rank of at most {min(in_features, out_features)}."
                )
            layers = tuple(number for number, _, _ in members)
            modules = tuple(path for _, path, _ in members)
            count = len(members)
            for factor, shape, dims in (
                ("lora_A", (count, self.rank, in_features), ("layer", "rank", "in_feature")),
                ("lora_B", (count, out_features, self.rank), ("layer", "out_feature", "rank")),
            ):
                keys = tuple(f"base_model.model.{path}.{factor}.weight" for path in modules)
                label = f"{self.name}.{kind}.{factor}" if self.name else f"{kind}.{factor}"
                sites.append(Site(label, torch.Size(shape), dims, modules, keys, layers))
        return tuple(sites)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: PEFT's start, A uniform and B zero."""
        start = {}
        for site in sites:
            value = torch.zeros(site.shape, dtype=backbone.site_dtype)
            if site.name.endswith("lora_A"):
                bound = 1 / math.sqrt(site.shape[-1])
                value.uniform_(-bound, bound, generator=generator)
            start[site.name] = value.to(backbone.device)
        return start

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: ``x -> (alpha / rank) B A x`` in the sites' own float type."""
        changes: dict[str, Delta] = {}
        for site in sites:
            if site.name.endswith("lora_A"):
                other = site.name.removesuffix("lora_A") + "lora_B"
                pairs = zip(draw[site.name].unbind(-3), draw[other].unbind(-3), site.modules, strict=True)
                scale = self.alpha / self.rank
                changes.update(
                    {path: _LowRankDelta(a, b, scale, site.name, other, i) for i, (a, b, path) in enumerate(pairs)}
                )
        return changes


@dataclass(frozen=True)
class _LowRankDelta:
    down: Tensor
    up: Tensor
    scale: float
    down_site: str
    up_site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        narrow = site_linear(rows, self.down, self.down_site, self.entry)
        # between the factors there are only `rank` activations a token to scale
        return site_linear(narrow * self.scale, self.up, self.up_site, self.entry).to(rows.dtype)
