"""Low-rank adaptation with stacked factors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import Adapter
from pyrolora.models.adapters.gated import LowRankDelta, RankGate
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

    by_position: ClassVar = True

    rank: int = field(default=8, metadata={"help": "inner dimension of the product B A"})
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

    @property
    def scaling(self) -> float:
        """What multiplies the product ``B A``."""
        return self.alpha / self.rank

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
        return uniform_down(backbone, sites, generator)

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: ``x -> (alpha / rank) B A x`` in the sites' own float type."""
        changes: dict[str, Delta] = {}
        gate = self.rank_gate(draw)
        for site in sites:
            if site.name.endswith("lora_A"):
                other = site.name.removesuffix("lora_A") + "lora_B"
                downs, ups = stack_entries(draw[site.name], site.name), stack_entries(draw[other], other)
                pairs = zip(downs, ups, site.modules, strict=True)
                changes.update(
                    {
                        path: LowRankDelta(a, b, self.scaling, site.name, other, i, gate)
                        for i, (a, b, path) in enumerate(pairs)
                    }
                )
        return changes

    def rank_gate(self, draw: Mapping[str, Tensor]) -> RankGate:
        """What multiplies the activations between the factors of every projection; nothing here.

        Args:
            draw: see `Adapter.deltas`.
        """
        return None

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: equal scales of A and B, since only their product is tied to W.

        ``E |s B A|^2 = s^2 sigma^4 rank in out`` for independent entries of standard deviation sigma.
        """
        scales = {}
        for down, up in factor_pairs(sites):
            numel = self.rank * down.shape[-1] * up.shape[-2]
            norm = weight_norms(backbone, down)
            scales[down.name] = scales[up.name] = (ratio * norm / (self.scaling * math.sqrt(numel))).sqrt()
        return scales

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Adapter.to_peft`."""
        weights = {
            key: value for site in sites for key, value in zip(site.keys, draw[site.name].unbind(0), strict=True)
        }
        return {**lora_config(sites), "r": self.rank, "lora_alpha": self.alpha}, weights


def uniform_down(
    backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """PEFT's start: every A uniform in ``+-1/sqrt(in)``, everything else zero; see `Adapter.initial`."""
    start = {}
    for site in sites:
        value = torch.zeros(site.shape, dtype=backbone.site_dtype)
        if site.name.endswith("lora_A"):
            bound = 1 / math.sqrt(site.shape[-1])
            value.uniform_(-bound, bound, generator=generator)
        start[site.name] = value.to(backbone.device)
    return start


def factor_pairs(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """The sites of A and of B that belong together, in program order."""
    named = {site.name: site for site in sites}
    return [
        (site, named[site.name.removesuffix("lora_A") + "lora_B"]) for site in sites if site.name.endswith("lora_A")
    ]


def weight_norms(backbone: Backbone, site: Site) -> Tensor:
    """Frobenius norm of the frozen weight of each entry of a site, ``(entries, 1, 1)``."""
    norms = [torch.linalg.matrix_norm(stored_weight(backbone, path)) for path in site.modules]
    return torch.stack(norms)[:, None, None]


def stored_weight(backbone: Backbone, path: str) -> Tensor:
    """The frozen weight at a path in the sites' float type."""
    weight: Any = backbone.network.get_submodule(path).weight
    return weight.detach().to(backbone.site_dtype)


def lora_config(sites: Sequence[Site]) -> dict[str, Any]:
    """What every adapter in PEFT's LoRA format says beside its ranks."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        # full paths, so that a choice of layers and shapes survives whatever PEFT matches by suffix
        "target_modules": sorted({module for site in sites for module in site.modules}),
    }
