"""Which entries of the stacks take part in backward: the others are constants of the network."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

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
    # one unbind: slicing entry by entry has a backward quadratic in their number
    entries = value.unbind(-event_dims)
    active = None if (given := _ACTIVE.get()) is None else given.get(site)
    if active is None:
        return entries
    return [entry if index in active else entry.detach() for index, entry in enumerate(entries)]
