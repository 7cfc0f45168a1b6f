"""What an attack looks at: predictions of images under draws that stay the same, gradients to the pixels only."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrolora.models.program import BayesianModel
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.tasks import row_count


class AttackTarget:
    """Logits of changed images of a batch, the mean over draws of their probabilities in logarithm.

    Usage::

        target = AttackTarget(model, batch, posterior.sample(3))
        attacked = PGD(8 / 255)(batch["pixel_values"], cross_entropy_objective(target, batch["labels"]))

    Several draws make it the expectation over transformations of an attack on a random model: against one draw at a time an
    attack finds the worst case of that draw. Labelled images of episodes are not attacked, and their features computed once.

    Source: Athalye et al., "Synthesizing Robust Adversarial Examples", 2018, equation 2.

    Args:
        model: the model.
        batch: the clean batch.
        draw: site name -> ``(draws, *site.shape)``, or the site's shape for one draw. Merge weights of a pool may have one
            row for each draw and episode.
        draws: number of draws.
    """

    def __init__(
        self, model: BayesianModel, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor], draws: int = 1
    ) -> None:
        self.model, self.draws = model, draws
        self.draw = {name: value.detach() for name, value in draw.items()}
        self.rows = row_count(batch)
        self.batch = model.repeated(batch, self.draws)
        if isinstance(model.head, PrototypeHead):
            with torch.no_grad():
                model.bind(self.draw, self.batch)
                self.batch["support_features"] = model.head.features(self.batch.pop("support"))

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images in the place of the batch's.

        Shape:
            ``(rows, channels, height, width)`` to ``(rows, classes)``
        """
        repeated = images.repeat(self.draws, *[1] * (images.dim() - 1)) if self.draws > 1 else images
        logits = self.draw_logits(repeated)
        return logits[0] if self.draws == 1 else logits.log_softmax(-1).logsumexp(0)

    def draw_logits(self, repeated: Tensor) -> Tensor:
        """Logits under every draw of images that are repeated with the draws, ``(draws, rows, classes)``."""
        logits = self.model.row_logits({**self.batch, "pixel_values": repeated}, self.draw)
        return logits.unflatten(0, (self.draws, self.rows))
