"""The last block at the answer position only: what other positions do not need of it is not computed for them."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# tokens and position of the row that dependencies are traced in
PROBE_TOKENS, PROBED = 5, 3

# hooks that do nothing but restrict positions, those of other backbones over one network included
_HARMLESS: WeakSet[Callable[..., Any]] = WeakSet()

_EVERY: ContextVar[bool] = ContextVar("every_position", default=False)


@contextmanager
def every_position() -> Iterator[None]:
    """Within the block all projections see all positions, for those who look at activations on the way.

    Usage::

        with every_position():
            features = backbone.features(batch)
    """
    token = _EVERY.set(True)
    try:
        yield
    finally:
        _EVERY.reset(token)


class AnswerPosition:
    """Restricts modules of a network's last block to one position a row, where nothing else of them is read.

    Keys and values are needed everywhere, the query, the attention's output and the feed-forward part at the answer alone.
    Which modules these are is found by tracing, not by name: a module qualifies if it maps each position by itself, and if
    the answer's hidden state does not change when its output at all others is not a number. So whatever mixes positions, or
    makes queries and keys in one product, stays as it is.

    Usage::

        answer = AnswerPosition(network, blocks, run_last_block, sample)
        answer.restrict(last, own_hooks=())         # until answer.positions is None again

    Attributes:
        modules: the modules that are restricted; none in networks where none qualifies.
        positions: the position of each row, or None to compute all of them.

    Args:
        network: the network.
        blocks: its blocks.
        run: a function that runs the last block on input ``(1, tokens, hidden)`` and returns what the network makes of it,
            of the same shape.
        sample: input of the block to trace with.
    """

    def __init__(
        self, network: PreTrainedModel, blocks: nn.ModuleList, run: Callable[[Tensor], Tensor], sample: Tensor
    ) -> None:
        self.positions: Tensor | None = None
        self.tokens = 0
        try:
            self.modules = _qualifying(blocks[-1], run, sample)
        except Exception as error:  # a network that cannot be traced runs as it did before
            logger.info("The last block runs at all positions: tracing it failed with %s", error)
            self.modules = ()
        below = {module for block in list(blocks)[:-1] for module in block.modules()}
        embeddings: Any = network.get_input_embeddings()
        below.update(embeddings.modules())
        # the last block and what comes after it: there activations at other positions would be missed
        self._watched = tuple(module for module in network.modules() if module not in below)
        gather, scatter = self._hooks()
        for module in self.modules:
            module.register_forward_pre_hook(gather)
            # the change of an adapter is added before this hook, which must see it
            module.register_forward_hook(scatter)

    def _hooks(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # functions, not methods: a copy of the network must not copy what they refer to

        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            if self.positions is None:
                return None
            rows: Tensor = args[0]
            self.tokens = rows.shape[1]
            return (rows[torch.arange(len(rows), device=rows.device), self.positions][:, None],)

        def scatter(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.positions is None:
                return None
            whole = output.new_zeros(output.shape[0], self.tokens, output.shape[-1])
            return whole.index_put((torch.arange(len(output), device=output.device), self.positions), output[:, 0])

        _HARMLESS.update((gather, scatter))
        return gather, scatter

    def restrict(self, positions: Tensor, own_hooks: Collection[int]) -> None:
        """Compute one position a row from now on, unless somebody looks at the others.

        Args:
            positions: the position of each row.
            own_hooks: ids of forward hooks that map every position by itself.

        Shape:
            positions ``(rows,)``
        """
        looked_at = any(
            number not in own_hooks and hook not in _HARMLESS
            for module in self._watched
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            for number, hook in hooks.items()
        )
        self.positions = None if looked_at or _EVERY.get() else positions


def recomputes(modules: Iterable[nn.Module]) -> bool:
    """Whether gradient checkpointing is on, so that backward runs some of the modules again."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in modules)


@torch.no_grad()
def _qualifying(block: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor) -> tuple[nn.Module, ...]:
    """The outermost modules with weights that are needed at the position of a feature alone."""
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        if plain and args[0].shape[:2] == output.shape[:2] == sample.shape[:2] and output.dim() == args[0].dim() == 3:
            seen[module] = args[0]

    handles = [
        module.register_forward_hook(note, with_kwargs=True) for module in block.modules() if module is not block
    ]
    try:
        run(sample)
    finally:
        for handle in handles:
            handle.remove()
    found: list[nn.Module] = []
    for module in block.modules():
        inside = any(module is part for taken in found for part in taken.modules())
        if inside or module not in seen or not any(weight.dim() > 1 for weight in module.parameters()):
            continue
        if _maps_positions_alone(module, seen[module]) and _unread_elsewhere(module, run, sample):
            found.append(module)
    return tuple(found)


def _maps_positions_alone(module: nn.Module, rows: Tensor) -> bool:
    whole, alone = module(rows), module(rows[:, PROBED : PROBED + 1])
    others = module(_tainted(rows))[:, PROBED]
    close = torch.allclose(alone[:, 0].float(), whole[:, PROBED].float(), rtol=0.05, atol=1e-3)
    return bool(others.isfinite().all()) and close


def _unread_elsewhere(module: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor) -> bool:
    handle = module.register_forward_hook(lambda module, args, output: _tainted(output))
    try:
        return bool(run(sample)[:, PROBED].isfinite().all())
    finally:
        handle.remove()


def _tainted(rows: Tensor) -> Tensor:
    """Not a number at every position but one: whatever is computed from them, even times zero, is none either."""
    others = torch.arange(rows.shape[1], device=rows.device) != PROBED
    return rows.masked_fill(others[:, None], torch.nan)
