"""The blocks of a transformer, and what stands in for them while only some of them run."""

from typing import Any

from torch import Tensor, nn


class Passing(nn.Module):
    """Stands in for a block: hands the hidden states to another module and ignores everything else."""

    def __init__(self, stand_in: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.stand_in, self.in_tuple = stand_in, in_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """What the other module makes of the hidden states."""
        passed = self.stand_in(hidden_states)
        return (passed, None) if self.in_tuple else passed


class Catch(nn.Module):
    """Keeps the first hidden states that pass through."""

    first: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The hidden states as they are."""
        if not hasattr(self, "first"):
            self.first = hidden_states
        return hidden_states


class Resume(nn.Module):
    """Returns stored hidden states whatever comes in."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The stored hidden states."""
        return self.stored.to(hidden_states.dtype)


def find_blocks(body: nn.Module) -> nn.ModuleList:
    """The list of a transformer's blocks.

    Args:
        body: the network below its head.

    Raises:
        ValueError: no list of as many modules as the configuration says.
    """
    count = body.config.num_hidden_layers  # type: ignore[union-attr]
    for _, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{type(body).__name__} has no list of {count} blocks (config.num_hidden_layers); "
        "pyrolora needs a transformer whose blocks are one nn.ModuleList."
    )
