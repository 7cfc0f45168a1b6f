"""Item embeddings of a recommender, projected into the slots of a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from pyrolora.models.adapters.base import Adapter, grouped_linear
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.prior_distributions import Improper
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

INNER, OUTER, TABLE = "projector.inner", "projector.outer", "projector.items"


@dataclass(frozen=True)
class ItemProjector(Adapter):
    """``embedding(slot) + outer GELU(inner e_i)`` at every slot of a hybrid prompt, with e_i the embedding of item i.

    Usage::

        data = task("next_item_hybrid", data_dir="runs/movielens")
        model = BayesianModel(backbone, data, [MixtureLoRA(rank=8), ItemProjector()])

    LLaRA's two layers; both have a bias, as a last column. The outer layer starts at zero, and with it the prompt is the
    network's own; LLaRA replaces the slot's embedding, which the bias can do. The sites ``projector.inner`` and
    ``projector.outer`` are no beliefs about the network: they have a flat prior and are points, unless a pattern that matches
    them alone says otherwise. The embeddings themselves are a constant of the model, kept with its posteriors.

    Source: Liao et al., "LLaRA: Large Language-Recommendation Assistant", 2024, section 3.2.

    Args:
        hidden: width between the layers; None for that of the network's embeddings.
        features: width of the items' embeddings.

    Raises:
        ValueError: a width below 1.
    """

    hidden: int | None = field(default=None, metadata={"help": "width between the layers; None for the network's"})
    features: int = field(default=64, metadata={"help": "width of the items' embeddings"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features < 1 or (self.hidden is not None and self.hidden < 1):
            raise ValueError(f"hidden and features must be at least 1; got {self.hidden} and {self.features}.")

    @property
    def context_keys(self) -> tuple[str, ...]:
        """See `Adapter.context_keys`: which item each token stands for."""
        return ("items",)

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`."""
        width = backbone.embedding_size
        hidden = width if self.hidden is None else self.hidden
        matrix = backbone.network.get_input_embeddings()
        path = next(path for path, module in backbone.network.named_modules() if module is matrix)
        shapes = {INNER: torch.Size((1, hidden, self.features + 1)), OUTER: torch.Size((1, width, hidden + 1))}
        return tuple(
            Site(
                name,
                shape,
                ("layer", f"{name.rsplit('.', 1)[-1]}_out", f"{name.rsplit('.', 1)[-1]}_in"),
                (path,),
                layers=(0,),
                prior=Improper(constraints.real, torch.Size(), shape),
                linear=False,
            )
            for name, shape in shapes.items()
        )

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: the inner layer uniform in +-1/sqrt(features), the outer zero."""
        start = {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype) for site in sites}
        bound = self.features**-0.5
        start[INNER].uniform_(-bound, bound, generator=generator)
        return {name: value.to(backbone.device) for name, value in start.items()}

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `Adapter.constants`: the task's item embeddings, scaled to unit variance.

        Raises:
            ValueError: the task has none, or of another width.
        """
        table = None if calibration is None else calibration.tables.get("items")
        if table is None:
            raise ValueError(
                "ItemProjector needs embeddings of items, which this task has not. Use task('next_item_hybrid', "
                "data_dir=...) with a folder that pyrolora windows prepared, or leave ItemProjector out."
            )
        if table.shape[-1] != self.features:
            raise ValueError(
                f"The items of this task have embeddings of {table.shape[-1]} numbers; ItemProjector expects "
                f"{self.features}. Give it features={table.shape[-1]}."
            )
        return {TABLE: (table / table.std()).to(backbone.device, backbone.site_dtype)}

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: a change of the input embedding's output."""
        items, inner, outer, table = draw.get("items"), draw[INNER].squeeze(-3), draw[OUTER].squeeze(-3), draw[TABLE]
        change = None
        if items is not None:
            embedded = functional.pad(table[items.clamp(min=0)], (0, 1), value=1.0)
            hidden = functional.pad(functional.gelu(grouped_linear(embedded, inner)), (0, 1), value=1.0)
            change = grouped_linear(hidden, outer) * (items >= 0)[..., None]
        (path,) = {module for site in sites for module in site.modules}
        return {path: _SlotDelta(change)}


@dataclass(frozen=True)
class _SlotDelta:
    change: Tensor | None

    def __call__(self, ids: Tensor) -> Tensor:
        if self.change is None:
            raise ValueError(
                "ItemProjector reads the batch entry 'items', which item each token stands for, and this forward has none. "
                "Ask the task in its own format, HybridScoring, which makes it."
            )
        # tokens that are generated after the prompt stand for no item
        if ids.shape[1] != self.change.shape[1]:
            return self.change.new_zeros(())
        # beams of one row stand together
        return self.change.repeat_interleave(ids.shape[0] // self.change.shape[0], dim=0)
