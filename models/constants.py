"""Constants of adapters, made once for all models of one backbone that need the same ones."""

import hashlib
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from pyrolora.models.adapters.base import Adapter
from pyrolora.models.backbones import Backbone
from pyrolora.models.calibration import Calibration
from pyrolora.models.sites import Site
from pyrolora.models.tasks import Task

# adapters whose constants are remembered for a backbone: the models of a comparison share them
MOST_RECENT = 4
_RECENT: "WeakKeyDictionary[Backbone, dict[tuple[str, ...], dict[str, Tensor]]]" = WeakKeyDictionary()


def shared_constants(
    backbone: Backbone,
    adapters: Iterable[tuple[Adapter, Sequence[Site]]],
    calibration: Calibration,
    task: Task,
    max_length: int,
) -> dict[str, Tensor]:
    """Constants of several adapters, from memory where a model of the same backbone, data and adapter made them before.

    Args:
        backbone: the frozen network.
        adapters: adapters with their sites.
        calibration: examples of the task, for adapters that look at data.
        task: whose training examples and prompts the calibration shows.
        max_length: longest prompt in tokens.

    Returns:
        Name of the constant -> value; see `Adapter.constants`.
    """
    recent = _RECENT.setdefault(backbone, {})
    found: dict[str, Tensor] = {}
    for adapter, sites in adapters:
        key = _key(backbone, adapter, task, max_length)
        if key not in recent:
            recent[key] = adapter.constants(backbone, sites, calibration)
        # the last used comes last, and the first is forgotten
        recent[key] = recent.pop(key)
        found.update(recent[key])
    while len(recent) > MOST_RECENT:
        del recent[next(iter(recent))]
    return found


def _key(backbone: Backbone, adapter: Adapter, task: Task, max_length: int) -> tuple[str, ...]:
    """All that an adapter's constants depend on, for one backbone."""
    # a weight counts its changes in place, so what was made from other weights is not found again
    changes = sum(weight._version for weight in backbone.network.parameters())
    if not adapter.reads_examples:
        return repr(adapter), str(changes)
    tables = {name: (tuple(table.shape), hash(table.numpy().tobytes())) for name, table in task.tables.items()}
    shown = [(row.fields, row.options, row.label) for row in task.train.examples]
    rows = hashlib.sha256(repr(shown).encode()).hexdigest()
    return repr(adapter), repr(task.format), rows, str(tables), str(max_length), str(changes)
