"""What an attack looks at: predictions of images under draws that stay the same, gradients to the pixels only."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyrolora.models.backbones import Delta
from pyrolora.models.program import BayesianModel
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.tasks import row_count


class AttackTarget:
    """Logarithm of the probabilities of a batch's rows, averaged over draws, as a function of the images.

    Usage::

        target = AttackTarget(model, batch, posterior.sample(3), 3)
        attacked = PGD(8 / 255)(batch["pixel_values"], cross_entropy_objective(target, batch["labels"]))

    Several draws make it the expectation over transformations of an attack on a random model: against one draw at a time an
    attack finds the worst case of that draw. Labelled images of episodes are not attacked, and their features computed once.

    Source: Athalye et al., "Synthesizing Robust Adversarial Examples", 2018, equation 2.

    Args:
        model: the model.
        batch: the clean batch.
        draw: site name -> ``(draws, *site.shape)``, or the site's shape for one draw; leading dimensions may be shorter where
            they divide the draws. Merge weights of a pool may have one row for each draw and episode.
        draws: number of draws.
        shares: probability of each draw for each row; None for equal ones.
        finish: makes other changes of the draw's changes, such as truncated ones.

    Shape:
        shares ``(draws, rows)``
    """

    def __init__(
        self,
        model: BayesianModel,
        batch: Mapping[str, Tensor],
        draw: Mapping[str, Tensor],
        draws: int = 1,
        *,
        shares: Tensor | None = None,
        finish: Callable[[Mapping[str, Delta]], Mapping[str, Delta]] | None = None,
    ) -> None:
        self.model, self.draws, self.rows = model, draws, row_count(batch)
        self.draw = {name: value.detach() for name, value in draw.items()}
        self.log_shares = None if shares is None else shares[..., None].log()
        self.batch = model.repeated(batch, draws)
        with torch.no_grad():
            # refuses rows that no one network stands for
            model.bind(self.batch, self.draw)
            deltas = model.deltas(self.draw, self.batch)
            self.deltas = deltas if finish is None else finish(deltas)
            self.gates = model.gates(self.draw, self.batch)
            if isinstance(model.head, PrototypeHead):
                model.backbone.bind(self.deltas, self.gates)
                self.batch["support_features"] = model.head.features(self.batch.pop("support"))

    def __call__(self, images: Tensor) -> Tensor:
        """Log probabilities of images in the place of the batch's, up to a constant for all classes.

        Shape:
            ``(rows, channels, height, width)`` to ``(rows, classes)``
        """
        repeated = images.repeat(self.draws, *[1] * (images.dim() - 1)) if self.draws > 1 else images
        logits = self.draw_logits(repeated)
        if self.draws == 1:
            return logits[0]
        weighted = logits.log_softmax(-1) if self.log_shares is None else logits.log_softmax(-1) + self.log_shares
        return weighted.logsumexp(0)

    def draw_logits(self, repeated: Tensor) -> Tensor:
        """Logits under every draw of images that are repeated with the draws, ``(draws, rows, classes)``."""
        self.model.backbone.bind(self.deltas, self.gates)
        logits = self.model.bound_logits({**self.batch, "pixel_values": repeated}, self.draw)
        return logits.unflatten(0, (self.draws, self.rows))
