"""The adapters of one model together: their sites, and what a draw of all of them changes in the network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Generator, Tensor

from pyrolora.models.adapters.base import Adapter
from pyrolora.models.backbones import Backbone, Delta, OutputGate
from pyrolora.models.sites import Site, SiteTable

Value = TypeVar("Value")


class AdapterSet:
    """Several adapters of one backbone as if they were one.

    Usage::

        given = (LoRA(), LastLayer())
        adapters = AdapterSet(given, [adapter.sites(backbone, classes) for adapter in given])
        adapters.bind(backbone, {**constants, **draw})

    ``values`` below are constants, draws and contexts by name, whatever an adapter may read.

    Args:
        adapters: the adapters.
        sites: the sites of each, in the same order.

    Attributes:
        table: all sites in order.
        context_keys: entries of a batch that any adapter's gates read.
    """

    def __init__(self, adapters: Sequence[Adapter], sites: Sequence[Sequence[Site]]) -> None:
        self.adapters = tuple(adapters)
        self._sites = tuple(tuple(some) for some in sites)
        self.table = SiteTable([site for some in self._sites for site in some])
        self.context_keys = tuple(dict.fromkeys(key for adapter in self.adapters for key in adapter.context_keys))

    def __iter__(self) -> Iterator[tuple[Adapter, tuple[Site, ...]]]:
        """Every adapter with its sites."""
        return zip(self.adapters, self._sites, strict=True)

    def _merged(self, each: Callable[[Adapter, tuple[Site, ...]], Mapping[str, Value]]) -> dict[str, Value]:
        return {name: value for adapter, sites in self for name, value in each(adapter, sites).items()}

    def initial(self, backbone: Backbone, generator: Generator | None) -> dict[str, Tensor]:
        """A start for every site; see `Adapter.initial`."""
        return self._merged(lambda adapter, sites: adapter.initial(backbone, sites, generator))

    def relative_scales(self, backbone: Backbone, constants: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
        """Standard deviations of every site for a ratio of change; see `Adapter.relative_scales`."""
        return self._merged(lambda adapter, sites: adapter.relative_scales(backbone, sites, constants, ratio))

    def centres(self, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Adapter.centres`."""
        return self._merged(lambda adapter, sites: adapter.centres(sites, constants))

    def diagnostics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Adapter.diagnostics`."""
        return self._merged(lambda adapter, sites: adapter.diagnostics(sites, values))

    def require_constants(self, values: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        """Refuse constants that are not all that the adapters need.

        Args:
            values: the constants and a value for every site.
            given: the constants alone, to be named.

        Raises:
            ValueError: one is missing.
        """
        for adapter, sites in self:
            try:
                adapter.deltas(sites, values)
            except KeyError as error:
                raise ValueError(
                    f"{type(adapter).__name__} needs the constant {error.args[0]!r}, which is not among those given "
                    f"({', '.join(given) or 'none'}). Leave constants out and they are made."
                ) from error

    def bind(self, backbone: Backbone, values: Mapping[str, Tensor]) -> None:
        """Put what the values change into the backbone until it is released."""
        by_position = all(adapter.by_position for adapter in self.adapters)
        backbone.bind(self.deltas(values), self.gates(values), by_position=by_position)

    def deltas(self, values: Mapping[str, Tensor]) -> dict[str, Delta]:
        """What is added to the output of each projection, summed where several adapters change one."""
        deltas: dict[str, Delta] = {}
        for adapter, sites in self:
            for path, delta in adapter.deltas(sites, values).items():
                deltas[path] = _sum_of(deltas[path], delta) if path in deltas else delta
        return deltas

    def gates(self, values: Mapping[str, Tensor]) -> dict[str, OutputGate]:
        """What is made of the changed output of each gated projection.

        Raises:
            ValueError: two adapters gate one projection.
        """
        gates: dict[str, OutputGate] = {}
        for adapter, sites in self:
            for path, gate in adapter.gates(sites, values).items():
                if path in gates:
                    raise ValueError(
                        f"Two adapters gate the output of {path}; give them other layers, or leave one out."
                    )
                gates[path] = gate
        return gates

    def label_changes(self, values: Mapping[str, Tensor]) -> list[tuple[Adapter, Delta]]:
        """Those adapters that change the class logits themselves, with what they add to them."""
        changes = [(adapter, adapter.label_change(values)) for adapter in self.adapters]
        return [(adapter, change) for adapter, change in changes if change is not None]

    @property
    def draws_locally(self) -> bool:
        """Whether an adapter draws something for every row anew, beside the sites."""
        return any(adapter.draws_locally for adapter in self.adapters)

    @property
    def enumerates(self) -> bool:
        """Whether an adapter sums a latent out, so that every row has several networks."""
        return any(adapter.enumerates for adapter in self.adapters)

    def with_local_draws(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values and what adapters draw for single rows; see `Adapter.local_draw`."""
        drawn = [adapter.local_draw(values) for adapter in self.adapters]
        return {**values, **{name: value for some in drawn for name, value in some.items()}}

    def enumerated(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Probabilities of the latent that an adapter sums out, if one does; see `Adapter.enumerated`.

        Raises:
            ValueError: several adapters do.
        """
        found = [mixing for adapter in self.adapters if (mixing := adapter.enumerated(values)) is not None]
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} adapters have a latent to sum out, which would take a forward for every pair of their values. "
                "Keep one gate='categorical' and make the others deterministic."
            )
        return found[0] if found else None


def _sum_of(first: Delta, second: Delta) -> Delta:
    return lambda rows: first(rows) + second(rows)
