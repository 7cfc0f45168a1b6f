"""S2FT: dense changes of a few heads' and channels' slices of the frozen weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import Adapter, site_linear
from pyrolora.models.adapters.lora import lora_config, stored_weight, weight_norms
from pyrolora.models.adapters.selection import STRATEGIES, HeadShape, Selection, role_of
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.calibration import calibration_batches
from pyrolora.models.moments import second_moments
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration


SHAPES = ("weight", "output")


@dataclass(frozen=True)
class S2FT(Adapter):
    """Trains whole columns (of o and down) or rows (of q, k, v, up and gate) of each weight, and nothing else.

    Usage::

        BayesianModel(backbone, task, adapter=S2FT(heads=1, channels=64), prior=Relative(0.1))

    ``y = W x + V x[index]`` for columns: of the activations only the chosen slice is kept for backward, and no weight is
    permuted, copied or touched. Sites are ``<kind>.columns`` with dims ``(layer, out_feature, channel)`` and ``<kind>.rows``
    with dims ``(layer, channel, in_feature)``; they are changes, so zero is the pretrained network. Models with grouped
    key and value heads and with biases are supported.

    Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", 2024.

    Args:
        heads: attention heads of each block (key and value heads where k or v is adapted).
        channels: feed-forward channels of each block.
        targets: projections to adapt; see `LoRA`.
        layers: see `LoRA`.
        name: see `LoRA`.
        select: ``"random"``, ``"weight"`` (norm), ``"activation"`` (root mean square), ``"product"`` of the two, or
            ``"gradient"`` (norm, on the task's labels).
        largest: take the units with the largest scores, else the smallest.
        seed: seeds the choice.
        samples: rows of calibration text.
        calibration: text file or task; None for the model's own training prompts.
        relative_to: what the scales of a `Relative` prior are shaped by: ``"weight"`` lets each slice change in proportion to
            its own norm, ``"output"`` lets each change the output equally on calibration text (``sigma_j`` in proportion to
            ``1 / rms(h_j)`` for a column with input h_j), so that channels which are silent may change most.

    Raises:
        ValueError: an unknown strategy or shape of scales, or counts below 1.
    """

    by_position: ClassVar = True

    heads: int = field(default=1, metadata={"help": "attention heads of each block"})
    channels: int = field(default=64, metadata={"help": "feed-forward channels of each block"})
    targets: tuple[str, ...] | str = field(
        default=("o_proj", "down_proj"), metadata={"help": "projections to adapt, as PEFT's target_modules"}
    )
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks to adapt; None for all"})
    name: str = field(default="", metadata={"help": "put before the names of the sites"})
    select: str = field(default="random", metadata={"help": f"one of {', '.join(STRATEGIES)}"})
    largest: bool = field(default=True, metadata={"help": "take the largest scores, else the smallest"})
    seed: int = field(default=0, metadata={"help": "seed of the choice"})
    samples: int = field(default=64, metadata={"help": "rows of calibration text"})
    calibration: str | None = field(default=None, metadata={"help": "text file or task; None for the model's own task"})

    relative_to: str = field(
        default="weight",
        metadata={"help": "shape of a Relative prior: in proportion to 'weight', or equal at the 'output'"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_to not in SHAPES:
            raise ValueError(
                f"Unknown relative_to {self.relative_to!r}. Did you mean {nearest(self.relative_to, SHAPES)!r}? "
                f"Choices: {', '.join(SHAPES)}."
            )
        if self.select not in STRATEGIES:
            raise ValueError(
                f"Unknown selection {self.select!r}. Did you mean {nearest(self.select, STRATEGIES)!r}? "
                f"Selections: {', '.join(STRATEGIES)}."
            )
        for name in ("heads", "channels", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}. To leave a projection out, drop it from targets."
                )

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: a target without known heads or channels, or more units than the network has.
        """
        shape = HeadShape.of(backbone)
        sites = []
        for kind, members in find_projections(backbone, self.targets, self.layers).items():
            unit, side = role_of(members[0][1])
            out_features, in_features = members[0][2].weight.shape
            wanted = self.channels if unit == "channel" else self.heads
            there = {"head": shape.heads, "group": shape.groups, "channel": (out_features, in_features)[side == "in"]}
            if wanted > there[unit]:
                what = {"head": "heads", "group": "key and value heads", "channel": "channels"}[unit]
                raise ValueError(f"{kind} of {backbone.name} has {there[unit]} {what}; {wanted} are asked for.")
            width = wanted * (1 if unit == "channel" else shape.width)
            size, dims, part = (
                ((out_features, width), ("layer", "out_feature", "channel"), "columns")
                if side == "in"
                else ((width, in_features), ("layer", "channel", "in_feature"), "rows")
            )
            label = f"{self.name}.{kind}.{part}" if self.name else f"{kind}.{part}"
            paths = tuple(path for _, path, _ in members)
            numbers = tuple(number for number, _, _ in members)
            sites.append(Site(label, torch.Size((len(members), *size)), dims, paths, (), numbers))
        return tuple(sites)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: no change."""
        return {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device) for site in sites}

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `Adapter.constants`: the chosen features of every block, in the network's own order.

        ``<site>.index`` holds the positions of columns ``(layers, width)``; for rows it holds for each output feature which
        row of the site changes it, ``(layers, out)``, the width itself marking none. With ``relative_to="output"``
        ``<site>.mean_square`` holds the mean square of the chosen columns' inputs ``(layers, width)``.
        """
        wanted = {unit: self.channels if unit == "channel" else self.heads for unit in {_role(s)[0] for s in sites}}
        selection = Selection(self.select, self.largest, self.seed, self.samples, self.calibration)
        layers = sorted({layer for site in sites for layer in site.layers})
        chosen = selection.units(backbone, layers, wanted, calibration)
        shape = HeadShape.of(backbone)
        found = {}
        for site in sites:
            unit, side = _role(site)
            stacks = []
            for layer, path in zip(site.layers, site.modules, strict=True):
                features = chosen[unit, layer]
                features = features if unit == "channel" else shape.features(features)
                if side == "out":
                    module: Any = backbone.network.get_submodule(path)
                    positions = torch.full((module.out_features,), len(features))
                    positions[features] = torch.arange(len(features))
                    features = positions
                stacks.append(features)
            found[f"{site.name}.index"] = torch.stack(stacks).to(backbone.device)
        if self.relative_to == "output":
            found |= self._mean_squares(backbone, [s for s in sites if _role(s)[1] == "in"], found, calibration)
        return found

    def _mean_squares(
        self,
        backbone: Backbone,
        sites: Sequence[Site],
        indices: Mapping[str, Tensor],
        calibration: "Calibration | None",
    ) -> dict[str, Tensor]:
        paths = [path for site in sites for path in site.modules]
        if not paths:
            return {}
        batches = calibration_batches(backbone, self.calibration, calibration, self.samples, self.seed)
        moments = second_moments(backbone, batches, paths, diagonal=True)
        return {
            f"{site.name}.mean_square": torch.stack(
                [moments[path][index] for path, index in zip(site.modules, indices[f"{site.name}.index"], strict=True)]
            )
            for site in sites
        }

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`."""
        changes: dict[str, Delta] = {}
        for site in sites:
            kind = _ColumnsDelta if _role(site)[1] == "in" else _RowsDelta
            entries = zip(stack_entries(draw[site.name], site.name), draw[f"{site.name}.index"], strict=True)
            for entry, (value, index) in enumerate(entries):
                changes[site.modules[entry]] = kind(value, index, site.name, entry)
        return changes

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: each slice in proportion to the slice of W that it changes.

        ``sigma_j = tau |W_j| / sqrt(out)`` for a column, or ``tau / rms(h_j)`` with ``relative_to="output"`` (rows, which
        read the same input, are equal then), with tau such that all chosen ones together reach the ratio.
        """
        scales = {}
        for site in sites:
            columns = _role(site)[1] == "in"
            sides = []
            for path, index in zip(site.modules, constants[f"{site.name}.index"], strict=True):
                weight = stored_weight(backbone, path)
                slices = (weight.mT if columns else weight)[_features(index, _role(site)[1], site)]
                sides.append(torch.linalg.vector_norm(slices, dim=-1))
            norms = torch.stack(sides) if self.relative_to == "weight" else self._equal_at_the_output(site, constants)
            tau = ratio * weight_norms(backbone, site)[..., 0] / torch.linalg.vector_norm(norms, dim=1, keepdim=True)
            scale = tau * norms / site.shape[1 if columns else 2] ** 0.5
            scales[site.name] = scale[:, None] if columns else scale[..., None]
        return scales

    def _equal_at_the_output(self, site: Site, constants: Mapping[str, Tensor]) -> Tensor:
        if _role(site)[1] == "out":
            return torch.ones(site.shape[:2]).to(constants[f"{site.name}.index"].device)
        squares = constants[f"{site.name}.mean_square"]
        # a channel that is never active has no scale of its own; the least active of its layer lends its one
        least = torch.where(squares > 0, squares, torch.inf).amin(1, keepdim=True)
        return torch.where(squares > 0, squares, least).rsqrt()

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Adapter.to_peft`: a LoRA one of whose factors is an identity with zeros between its rows."""
        weights, ranks = {}, {}
        for site in sites:
            columns = _role(site)[1] == "in"
            stacks = zip(site.modules, draw[site.name], constants[f"{site.name}.index"], strict=True)
            for path, value, index in stacks:
                # rows of the identity, one for each chosen feature
                features = stored_weight(backbone, path).shape[1 if columns else 0]
                chosen = functional.one_hot(_features(index, _role(site)[1], site), features).to(value)
                pair = (chosen, value) if columns else (value, chosen.mT)
                for factor, tensor in zip(("lora_A", "lora_B"), pair, strict=True):
                    weights[f"base_model.model.{path}.{factor}.weight"] = tensor
                ranks[path] = value.shape[1 if columns else 0]
        rank = max(ranks.values())
        patterns = {path: width for path, width in ranks.items() if width != rank}
        config = {"r": rank, "lora_alpha": rank, "rank_pattern": patterns, "alpha_pattern": patterns}
        return {**lora_config(sites), **config}, weights


@dataclass(frozen=True)
class _ColumnsDelta:
    value: Tensor
    index: Tensor
    site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        # selected before it is cast: what backward keeps is the slice
        slices = rows.index_select(-1, self.index).to(self.value.dtype)
        return site_linear(slices, self.value, self.site, self.entry).to(rows.dtype)


@dataclass(frozen=True)
class _RowsDelta:
    value: Tensor
    index: Tensor
    site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        changed = site_linear(rows, self.value, self.site, self.entry)
        # one more feature, always zero, for all that no row changes
        return functional.pad(changed, (0, 1)).index_select(-1, self.index).to(rows.dtype)


def _role(site: Site) -> tuple[str, str]:
    return role_of(site.modules[0])


def _features(index: Tensor, side: str, site: Site) -> Tensor:
    """Positions of the chosen features in the frozen weight, in the order of the site's slices."""
    return index if side == "in" else (index < site.shape[1]).nonzero()[:, 0]
