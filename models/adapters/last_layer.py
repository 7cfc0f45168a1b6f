"""A change of the label rows of the output embedding: the site of last-layer posteriors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.adapters.base import Adapter, site_linear
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

HEAD = "head.weight"
CENTRES = ("rows", "zero")


@dataclass(frozen=True)
class LastLayer(Adapter):
    """A full-rank change of the label rows, one site ``head.weight`` with dims ``(class, feature)``.

    Usage::

        BayesianModel(backbone, task, adapter=[LoRA(), LastLayer()])

    The logit of class k is ``(W_k + head.weight_k) . features``, so zero is the pretrained model and a zero-mean prior
    is centred there. Only tasks with label words or letters have label rows.

    Args:
        bias: append 1 to the features, so that the last column of the site is a bias.
        centre: ``"rows"``: the site is a change of the network's label rows; ``"zero"``: it takes their place, so that a
            zero-mean prior is centred at equal logits and the start is there, not at the pretrained model.
        identified: leave out the first class, whose row stays as it is. A shift of all logits changes no probability; without
            that direction two classes have one vector of weights.

    Raises:
        ValueError: an unknown centre; the nearest is offered.
    """

    by_position: ClassVar = True

    bias: bool = field(default=False, metadata={"help": "append 1 to the features"})
    centre: str = field(default="rows", metadata={"help": ", ".join(CENTRES)})
    identified: bool = field(default=False, metadata={"help": "leave out the first class"})

    def __post_init__(self) -> None:
        if self.centre not in CENTRES:
            raise ValueError(
                f"Unknown centre {self.centre!r} for LastLayer. Did you mean {nearest(str(self.centre), CENTRES)!r}? "
                f"Choices: {', '.join(CENTRES)}."
            )

    @property
    def keeps_label_rows(self) -> bool:
        """See `Adapter.keeps_label_rows`."""
        return self.centre == "rows"

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: the task scores options and has no label rows.
        """
        if classes is None:
            raise ValueError(
                "LastLayer needs label rows, and this task scores options instead. Use a task with label words or "
                "letters, or leave LastLayer out."
            )
        shape = torch.Size((classes - self.identified, backbone.hidden_size + self.bias))
        return (Site(HEAD, shape, ("class", "feature")),)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: zero, the pretrained rows (equal logits for ``centre="zero"``)."""
        return {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device) for site in sites}

    def inputs(self, features: Tensor) -> Tensor:
        """What the site's matrix is multiplied with: the features, and 1 where there is a bias.

        Shape:
            ``(..., hidden)`` to ``(..., columns of the site)``
        """
        return functional.pad(features, (0, 1), value=1.0) if self.bias else features

    def label_change(self, draw: Mapping[str, Tensor]) -> Delta | None:
        """See `Adapter.label_change`."""
        weight = draw[HEAD]

        def change(features: Tensor) -> Tensor:
            logits = site_linear(self.inputs(features), weight, HEAD)
            return functional.pad(logits, (1, 0)) if self.identified else logits

        return change
