"""Full-rank changes of whole weights: what layerwise schedules train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import Adapter, grouped_linear, site_linear
from pyrolora.models.adapters.lora import weight_norms
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.local import LocalWeight
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration


LABELS = ".labels"


@dataclass(frozen=True)
class FullRank(Adapter):
    """A dense change of every weight, ``y = (W + V) x``, one site ``<kind>.weight`` for each kind of projection.

    Usage::

        BayesianModel(backbone, task, adapter=[FullRank(embeddings=True), LastLayer()], prior=Relative(0.1))

    Full fine-tuning as a Pyro program, and with `BlockSchedule` the layerwise training of LISA. The change is added to the
    frozen projection's output, which costs a second product of the same size, in the type of the backbone; in return the
    backbone stays untouched, shared and restorable, and a change too small for the type of a weight is not lost beside it.
    Norms are not adapted.

    ``embeddings=True`` adds the site ``embed_tokens.weight`` with dims ``(layer, token, feature)`` and one layer. Where input
    and output embedding are one matrix the label rows change with it, counted once.

    Args:
        targets: see `LoRA`.
        layers: see `LoRA`.
        embeddings: whether token embeddings change as well.
        name: see `LoRA`.
    """

    by_position: ClassVar = True

    targets: tuple[str, ...] | str = field(
        default="all-linear", metadata={"help": "projections to adapt, as PEFT's target_modules"}
    )
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks to adapt; None for all"})
    embeddings: bool = field(default=False, metadata={"help": "whether token embeddings change as well"})
    name: str = field(default="", metadata={"help": "put before the names of the sites"})

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: embeddings that are also the output embedding, on a task that scores options with all of it.
        """
        sites = []
        for kind, members in find_projections(backbone, self.targets, self.layers).items():
            shape = torch.Size((len(members), *members[0][2].weight.shape))
            paths, layers = tuple(path for _, path, _ in members), tuple(number for number, _, _ in members)
            sites.append(Site(self._label(kind), shape, ("layer", "out_feature", "in_feature"), paths, (), layers))
        if self.embeddings:
            if classes is None and _tied(backbone):
                raise ValueError(
                    f"The embeddings of {backbone.name} are its output embedding too, which this task reads in full to score "
                    "options. Use a task with label words or letters, or embeddings=False."
                )
            matrix: Any = backbone.network.get_input_embeddings()
            path = next(path for path, module in backbone.network.named_modules() if module is matrix)
            kind = path.rsplit(".", 1)[-1]
            shape = torch.Size((1, *matrix.weight.shape))
            sites.append(Site(self._label(kind), shape, ("layer", "token", "feature"), (path,), (), (0,), linear=False))
        return tuple(sites)

    def _label(self, kind: str) -> str:
        return f"{self.name}.{kind}.weight" if self.name else f"{kind}.weight"

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: no change."""
        return {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device) for site in sites}

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `Adapter.constants`: the label tokens, where their rows change with the embeddings."""
        if not self.embeddings or not _tied(backbone) or calibration is None:
            return {}
        return {sites[-1].name + LABELS: torch.tensor(calibration.label_ids, device=backbone.device)}

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`."""
        changes: dict[str, Delta] = {}
        for site in sites:
            kind = _EmbeddingDelta if site.dims[1] == "token" else _WeightDelta
            for entry, value in enumerate(stack_entries(draw[site.name], site.name)):
                changes[site.modules[entry]] = kind(value, site.name, entry)
        return changes

    def label_change(self, draw: Mapping[str, Tensor]) -> Delta | None:
        """See `Adapter.label_change`."""
        prefix = f"{self.name}." if self.name else ""
        for name in draw:
            site = name.removesuffix(LABELS)
            if name != site and name.startswith(prefix) and site.removeprefix(prefix).count(".") == 1:
                rows = draw[site].squeeze(-3).index_select(-2, draw[name])
                # not `site_linear`: the same weights act on the tokens too, so the head is not all of their effect
                return partial(grouped_linear, weight=rows)
        return None

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: ``ratio |W| / sqrt(in out)``."""
        return {
            site.name: ratio * weight_norms(backbone, site) / (site.shape[1] * site.shape[2]) ** 0.5 for site in sites
        }


@dataclass(frozen=True)
class _WeightDelta:
    value: Tensor | LocalWeight
    site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        # a dense product costs what the frozen one does: in the backbone's own type, the master copy stays in float32
        value = self.value if isinstance(self.value, LocalWeight) else self.value.to(rows.dtype)
        return site_linear(rows, value, self.site, self.entry).to(rows.dtype)


@dataclass(frozen=True)
class _EmbeddingDelta:
    value: Tensor
    site: str
    entry: int

    def __call__(self, ids: Tensor) -> Tensor:
        if self.value.dim() == 2:
            return functional.embedding(ids, self.value)
        groups, tokens, _ = self.value.shape
        first = torch.arange(groups, device=ids.device) * tokens
        shifted = ids.unflatten(0, (groups, -1)) + first[:, None, None]
        return functional.embedding(shifted.flatten(0, 1), self.value.flatten(0, 1))


def _tied(backbone: Backbone) -> bool:
    network: Any = backbone.network
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight
