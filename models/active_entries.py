"""Which entries of the stacks take part in backward: the others are constants of the network."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class ActiveEntries:
    """Within the block, only the named entries of the sites' stacks get gradients from the likelihood.

    The graph of the network then begins at the lowest active block, so backward stops there and nothing below it is kept.

    Usage::

        with ActiveEntries({"q_proj.lora_A": {5, 20}, "q_proj.lora_B": {5, 20}}):
            logits = model.row_logits(batch, draw)

    Args:
        entries: site name -> positions in its stack; sites left out are active as a whole.
    """

    def __init__(self, entries: Mapping[str, frozenset[int]]) -> None:
        self.entries = entries

    def __enter__(self) -> "ActiveEntries":
        """Begin."""
        self._token = _ACTIVE.set(self.entries)
        return self

    def __exit__(self, *details: Any) -> None:
        """End."""
        _ACTIVE.reset(self._token)


_ACTIVE: ContextVar[Mapping[str, frozenset[int]] | None] = ContextVar("active_entries", default=None)


def stack_entries(value: Tensor, site: str, event_dims: int = 3) -> Sequence[Tensor]:
    """The entries of a site's stack, those that are not active cut off from the graph.

    Args:
        value: value of the site, maybe with a leading dimension of draws.
        site: name of the site.
        event_dims: dimensions of the site, of which the stack is the first.
    """
    active = None if (given := _ACTIVE.get()) is None else given.get(site)
    if active is None:
        # one unbind: slicing entry by entry has a backward quadratic in their number
        return value.unbind(-event_dims)
    # one selection: the backward of an unbind writes every entry, and most rest
    entries, which = list(value.detach().unbind(-event_dims)), sorted(active)
    chosen = value.index_select(-event_dims, torch.tensor(which, dtype=torch.long, device=value.device))
    for index, entry in zip(which, chosen.unbind(-event_dims), strict=True):
        entries[index] = entry
    return entries
