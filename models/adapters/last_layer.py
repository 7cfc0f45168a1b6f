"""A change of the label rows of the output embedding: the site of last-layer posteriors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.models.adapters.base import Adapter, site_linear
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class LastLayer(Adapter):
    """A full-rank change of the label rows, one site ``head.weight`` with dims ``(class, feature)``.

    Usage::

        BayesianModel(backbone, task, adapter=[LoRA(), LastLayer()])

    The logit of class k is ``(W_k + head.weight_k) . features``, so zero is the pretrained model and a zero-mean prior
    is centred there. Only tasks with label words or letters have label rows.
    """

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
        shape = torch.Size((classes, backbone.hidden_size))
        return (Site("head.weight", shape, ("class", "feature")),)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: zero, the pretrained rows."""
        return {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device) for site in sites}

    def label_change(self, draw: Mapping[str, Tensor]) -> Delta | None:
        """See `Adapter.label_change`."""
        weight = draw["head.weight"]
        return lambda features: site_linear(features, weight, "head.weight")
