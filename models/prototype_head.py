"""Class logits of an episode's queries from the prototypes of its labelled images, all under one draw."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.prototypes import prototype_logits
from pyrolora.models.tasks.episodes import EpisodeClasses


class PrototypeHead:
    """Scaled cosines of queries with the mean features of each class, in the place of a `LabelHead`.

    Labelled images and queries go through the network together, episode by episode, so draws and gates that are for equal
    runs of rows are for episodes. Logits of one episode depend on each other's weights through the prototypes: they are no
    function of the query's features alone.

    Args:
        backbone: the frozen network.
        form: ways, shots, queries, scale and bias.
    """

    def __init__(self, backbone: Backbone, form: EpisodeClasses) -> None:
        self.backbone = backbone
        self.form = form

    def __call__(
        self, batch: Mapping[str, Tensor], label_changes: Sequence[Delta], trunk: Tensor | None, first_block: int
    ) -> Tensor:
        """See `Head`; with ``support_features`` in the batch the labelled images are not looked at.

        Shape:
            ``(episodes * queries, ways)``

        Raises:
            ValueError: labelled images of another size than the queries.
        """
        device = self.backbone.device
        labels = batch["support_labels"].to(device)
        queries = batch["pixel_values"].to(device).unflatten(0, (len(labels), -1))
        support = batch.get("support_features")
        if support is None:
            sizes = [tuple(images.shape[2:]) for images in (batch["support"], queries)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The labelled images are {sizes[0]} and the queries {sizes[1]}, (channels, height, width). Bring both "
                    "to one size, or encode the split with the model."
                )
            together = self.features(torch.cat([batch["support"].to(device), queries], dim=1))
            support, features = together.split([labels.shape[1], queries.shape[1]], dim=1)
        else:
            features = self.features(queries)
        logits = prototype_logits(features, support, labels, self.form.ways, self.form.scale, self.form.bias)
        return logits.flatten(0, 1)

    def features(self, images: Tensor) -> Tensor:
        """Features of images under whatever draw is bound.

        Shape:
            ``(episodes, images, channels, height, width)`` to ``(episodes, images, hidden)``
        """
        found = self.backbone.features({"pixel_values": images.flatten(0, 1)}).to(self.backbone.site_dtype)
        return found.unflatten(0, images.shape[:2])
