"""Low-rank adaptation of the label rows of the output embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pyrolora.models.adapters.base import Adapter
from pyrolora.models.adapters.gated import LowRankDelta
from pyrolora.models.adapters.lora import uniform_down
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.sites import Site

DOWN, UP = "lm_head.lora_A", "lm_head.lora_B"


@dataclass(frozen=True)
class LabelLoRA(Adapter):
    """A low-rank change of the class logits, ``(W + (alpha / rank) B A) . features`` with a row of B for each class.

    Usage::

        BayesianModel(backbone, task, adapter=[LoRA(), LabelLoRA()])

    What PEFT trains with ``lm_head`` among its ``target_modules``, where the loss reads the logits of the labels alone: rows
    of B of other tokens have no gradient, and are not kept. Sites are ``lm_head.lora_A`` with dims ``(rank, feature)`` and
    ``lm_head.lora_B`` with dims ``(class, rank)``. A change of full rank is `LastLayer`.

    Source: Wang et al., "BLoB", 2024: its released code adapts the vocabulary head beside queries and values.

    Args:
        rank: inner dimension of the product.
        alpha: numerator of the scaling ``alpha / rank``.

    Raises:
        ValueError: the rank is not positive, or alpha not positive.
    """

    by_position: ClassVar = True

    rank: int = field(default=8, metadata={"help": "inner dimension of the product B A"})
    alpha: float = field(default=16.0, metadata={"help": "numerator of the scaling alpha / rank"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank and alpha must be positive; got {self.rank} and {self.alpha}. Usual are 8 and 16.")

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: the task scores options and has no label rows, or the rank exceeds the width of the features.
        """
        if classes is None:
            raise ValueError(
                "LabelLoRA needs label rows, and this task scores options instead. Use a task with label words or "
                "letters, or leave LabelLoRA out."
            )
        if self.rank > backbone.hidden_size:
            raise ValueError(
                f"Rank {self.rank} exceeds the {backbone.hidden_size} features of the network. Choose a smaller one."
            )
        return (
            Site(DOWN, torch.Size((self.rank, backbone.hidden_size)), ("rank", "feature")),
            Site(UP, torch.Size((classes, self.rank)), ("class", "rank")),
        )

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: PEFT's start, A uniform and B zero."""
        return uniform_down(backbone, sites, generator)

    def label_change(self, draw: Mapping[str, Tensor]) -> Delta | None:
        """See `Adapter.label_change`."""
        return LowRankDelta(draw[DOWN], draw[UP], self.alpha / self.rank, DOWN, UP, entry=0)
