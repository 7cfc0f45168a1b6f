"""Hidden states below the lowest adapted block, computed once per example and kept."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrolora.models.backbones import Backbone

# bytes of hidden states that are kept
BUDGET = 2**30


class TrunkCache:
    """Keeps each example's hidden states at the input of the lowest adapted block.

    Blocks that no site changes give the same output in every step and for every draw, so an epoch needs them once.
    Exact: with a causal or segment mask, padding never reaches a token's hidden state.

    Usage::

        cache = TrunkCache(backbone, first_block=20, num_rows=300)
        for batch in batches:
            model(cache.attach(batch))

    Args:
        backbone: the frozen network.
        first_block: number of the lowest adapted block; 0 leaves batches as they are.
        num_rows: rows of the data set that ``index`` refers to.
        budget: bytes the cache may hold; beyond it the trunk is recomputed for the rows that do not fit.
    """

    def __init__(self, backbone: Backbone, first_block: int, num_rows: int, budget: int = BUDGET) -> None:
        self.backbone = backbone
        self.first_block = first_block
        self.room = budget
        self._rows: list[Tensor | None] = [None] * num_rows

    def attach(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch with ``trunk`` added, from the cache where every row is in it; one that has a trunk keeps it.

        Shape:
            ``trunk`` is ``(rows, tokens, hidden)``.
        """
        if self.first_block == 0 or "trunk" in batch:
            return batch
        mask = self.backbone.token_mask(batch).bool().to(self.backbone.device)
        stored = [self._rows[row] for row in batch["index"].tolist()]
        known = [row for row in stored if row is not None]
        if len(known) == len(stored):
            trunk = torch.zeros(*mask.shape, known[0].shape[-1], dtype=known[0].dtype, device=mask.device)
            trunk[mask] = torch.cat(known)
            return {**batch, "trunk": trunk}
        trunk = self.backbone.trunk(batch, self.first_block)
        for row, (states, kept) in zip(batch["index"].tolist(), zip(trunk, mask, strict=True), strict=True):
            size = int(kept.sum()) * trunk.shape[-1] * trunk.element_size()
            if self._rows[row] is None and size <= self.room:
                self._rows[row] = states[kept].clone()
                self.room -= size
        return {**batch, "trunk": trunk}
