"""Which blocks of the sites are trained when: layerwise schedules, apart from adapters and engines."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from pyrolora.models.adapters.lora import weight_norms
from pyrolora.models.backbones import Backbone
from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers
from pyrolora.models.sites import Site, SiteTable

SAMPLERS = ("uniform", "cycle", "norm")
STATES = ("drop", "keep", "offload")
UPDATES = ("coordinate", "unbiased")
# quadrature nodes for the probability that a block is among those sampled in proportion to norms
NODES = 400

Entries = dict[str, frozenset[int]]


@dataclass(frozen=True)
class BlockSchedule:
    """Trains a few blocks at a time: layerwise importance sampled training, for any adapter, guide and engine.

    Usage::

        SVI(guide=BLoB(), schedule=BlockSchedule(active=2, every=20)).fit(model, task.train)

    Blocks that rest keep their posterior and are still sampled from it, so the active ones see its width; their KL stays in
    the reported ELBO, whose gradient for the active blocks is that of the whole ELBO. Backward stops below the lowest active
    block. The active blocks of an interval follow from the seed and its number alone: the same on every rank, and after
    resuming in mid-interval.

    A given block is never trained with probability ``(1 - active / blocks) ** intervals`` under ``"uniform"``; take at least
    ``3 * blocks / active`` intervals, or ``"cycle"``.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", 2024,
    algorithm 1; ``"cycle"`` is the order of Luo et al., "BAdam", 2024.

    Args:
        blocks: ``"layer"`` for one block a transformer layer, or glob patterns, one a block, of ``<layer>.<site>``, such
            as ``("?.*", "1?.*", "2?.*")``.
        active: blocks that are trained at a time, beside those that always are.
        every: optimisation steps of an interval.
        sampler: ``"uniform"`` without replacement, ``"cycle"`` through random permutations, or ``"norm"``: without
            replacement, in proportion to the norm of the frozen weights that a block adapts.
        always: glob patterns of sites that are trained throughout; sites that belong to no layer always are.
        state: what becomes of Adam's moments of a block that comes to rest: ``"drop"`` (as published), ``"keep"``, or
            ``"offload"`` to the CPU.
        seed: seeds the sampler; None for the fit's own seed.
        update: ``"coordinate"`` (as published) takes a block's gradient as it is; ``"unbiased"`` divides it by the
            probability that the block is active, so that over the schedule's draws the gradient of the whole loss is met on
            average. Adam divides by the gradients' own size and hardly notices; clipping and plain steps do.

    Raises:
        ValueError: a setting out of range or unknown.
    """

    blocks: tuple[str, ...] | str = field(default="layer", metadata={"help": "'layer', or glob patterns of blocks"})
    active: int = field(default=2, metadata={"help": "blocks that are trained at a time"})
    every: int = field(default=20, metadata={"help": "steps between two switches"})
    sampler: str = field(default="uniform", metadata={"help": "'uniform', 'cycle' or 'norm'"})
    always: tuple[str, ...] = field(default=(), metadata={"help": "glob patterns of sites that are always trained"})
    state: str = field(
        default="drop", metadata={"help": "'drop', 'keep' or 'offload' Adam's moments of resting blocks"}
    )
    seed: int | None = field(default=None, metadata={"help": "seed of the sampler; None for the fit's own"})
    update: str = field(
        default="coordinate", metadata={"help": "'coordinate' or 'unbiased' gradients of active blocks"}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.blocks != "layer":
            object.__setattr__(self, "blocks", (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks))
        object.__setattr__(self, "always", (self.always,) if isinstance(self.always, str) else tuple(self.always))
        for name in ("active", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name, valid in (("sampler", SAMPLERS), ("state", STATES), ("update", UPDATES)):
            given = getattr(self, name)
            if given not in valid:
                raise ValueError(
                    f"Unknown {name} {given!r}. Did you mean {nearest(given, valid)!r}? Choices: {', '.join(valid)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def plan(self, sites: SiteTable, backbone: Backbone, seed: int) -> "BlockPlan":
        """The schedule of one fit.

        Args:
            sites: the model's sites.
            backbone: whose frozen weights the sites adapt.
            seed: seed of the fit.

        Raises:
            ValueError: patterns that match nothing or overlap, an entry without a block, or fewer blocks than are active.
        """
        return BlockPlan(self, sites, backbone, seed)


class BlockPlan:
    """A `BlockSchedule` resolved for the sites of a model.

    Attributes:
        blocks: block's name -> site name -> entries of the site's stack.
        resting_sites: sites whose entries are not all active all the time.

    Args:
        schedule: the settings.
        sites: the model's sites.
        backbone: whose frozen weights the sites adapt.
        seed: seed of the fit.
    """

    def __init__(self, schedule: BlockSchedule, sites: SiteTable, backbone: Backbone, seed: int) -> None:
        self.schedule = schedule
        self.seed = seed if schedule.seed is None else schedule.seed
        for pattern in schedule.always:
            if not sites.matching(pattern):
                raise ValueError(
                    f"The pattern {pattern!r} of sites that are always trained matches none. Did you mean "
                    f"{nearest(pattern, sites)!r}? Sites: {', '.join(sites)}."
                )
        stacks = [site for site in sites.values() if site.layers and not any(site.matches(p) for p in schedule.always)]
        self.resting_sites = tuple(site.name for site in stacks)
        found: dict[str, dict[str, set[int]]] = {}
        if isinstance(schedule.blocks, tuple):
            found = {pattern: {} for pattern in schedule.blocks}
        for site in stacks:
            for entry, layer in enumerate(site.layers):
                found.setdefault(self._block_of(site, layer), {}).setdefault(site.name, set()).add(entry)
        if schedule.blocks == "layer":
            found = dict(sorted(found.items(), key=lambda item: int(item[0])))
        for name, entries in found.items():
            if not entries:
                raise ValueError(
                    f"The block {name!r} holds no site. Blocks are matched against names such as 0.{stacks[0].name}."
                )
        if schedule.active > len(found):
            raise ValueError(
                f"{schedule.active} blocks are to be active, and the model has {len(found)}"
                f" ({', '.join(found) or 'all sites are always trained'}). Lower active, or leave the schedule out."
            )
        self.blocks: dict[str, Entries] = {
            name: {site: frozenset(which) for site, which in entries.items()} for name, entries in found.items()
        }
        self.norms = self._norms(sites, backbone) if schedule.sampler == "norm" else None

    def _block_of(self, site: Site, layer: int) -> str:
        if not isinstance(self.schedule.blocks, tuple):
            return str(layer)
        label = f"{layer}.{site.name}"
        matched = [pattern for pattern in self.schedule.blocks if fnmatchcase(label, pattern)]
        if len(matched) != 1:
            how = f"to the blocks {' and '.join(map(repr, matched))}" if matched else "to no block"
            raise ValueError(
                f"{label!r} belongs {how}; it must belong to one. Name its site in always= if it is to be trained throughout."
            )
        return matched[0]

    def _norms(self, sites: SiteTable, backbone: Backbone) -> torch.Tensor:
        """Norm of the frozen weights that each block adapts, each weight once."""
        by_path: dict[str, float] = {}
        for name in self.resting_sites:
            norms = weight_norms(backbone, sites[name])[:, 0, 0].tolist()
            by_path.update(zip(sites[name].modules, norms, strict=True))
        totals = []
        for entries in self.blocks.values():
            paths = {sites[name].modules[entry] for name, which in entries.items() for entry in which}
            totals.append(sum(by_path[path] ** 2 for path in paths) ** 0.5)
        return torch.tensor(totals, dtype=torch.float64)

    def interval(self, step: int) -> int:
        """Number of the interval that a step, counted from 0, belongs to."""
        return step // self.schedule.every

    def active(self, interval: int) -> tuple[str, ...]:
        """Names of the blocks that an interval trains, in the order of the network."""
        count, total = self.schedule.active, len(self.blocks)
        if self.schedule.sampler == "cycle":
            # the last chunk of a cycle is filled up from its beginning, so that it is as large as the others
            chunks = -(-total // count)
            order = torch.randperm(total, generator=self._generator(interval // chunks))
            first = (interval % chunks) * count
            chosen = torch.cat([order[first : first + count], order])[:count]
        elif self.norms is not None:
            chosen = torch.multinomial(self.norms, count, generator=self._generator(interval))
        else:
            chosen = torch.randperm(total, generator=self._generator(interval))[:count]
        names = tuple(self.blocks)
        return tuple(names[index] for index in sorted(chosen.tolist()))

    def entries(self, interval: int) -> Entries:
        """Site name -> entries that an interval trains; sites that are always trained are left out."""
        found: dict[str, set[int]] = {name: set() for name in self.resting_sites}
        for block in self.active(interval):
            for site, entries in self.blocks[block].items():
                found[site] |= entries
        return {name: frozenset(entries) for name, entries in found.items()}

    def probabilities(self) -> dict[str, float]:
        """Block's name -> probability that an interval trains it."""
        count, total = self.schedule.active, len(self.blocks)
        if self.norms is None:
            return dict.fromkeys(self.blocks, count / total)
        return dict(zip(self.blocks, inclusion_probabilities(self.norms, count).tolist(), strict=True))

    def gradient_factors(self) -> dict[str, dict[int, float]]:
        """Site name -> entry -> what its gradient is multiplied with while it is active; empty for coordinate updates."""
        if self.schedule.update == "coordinate":
            return {}
        factors: dict[str, dict[int, float]] = {}
        for block, probability in self.probabilities().items():
            for site, entries in self.blocks[block].items():
                factors.setdefault(site, {}).update(dict.fromkeys(entries, 1 / probability))
        return factors

    def visits(self, steps: int) -> dict[str, int]:
        """Optimisation steps that each block has been trained for, of the first ``steps``; zero is a block never trained."""
        counts = dict.fromkeys(self.blocks, 0)
        for first in range(0, steps, self.schedule.every):
            for name in self.active(self.interval(first)):
                counts[name] += min(self.schedule.every, steps - first)
        return counts

    def _generator(self, number: int) -> torch.Generator:
        # of this plan and this number alone: no global state, nothing to keep in a checkpoint
        digest = hashlib.sha256(f"{self.schedule.sampler}:{self.seed}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def inclusion_probabilities(weights: torch.Tensor, count: int) -> torch.Tensor:
    """Probability of each item to be among ``count`` drawn one after another without replacement, in proportion to weights.

    The items come in the order of independent exponential times with the weights as rates, so an item is drawn if fewer than
    ``count`` others come before it: a Poisson-binomial probability, integrated over the item's own time by Gauss-Legendre.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.

    Args:
        weights: positive, ``(items,)``.
        count: items drawn.

    Shape:
        ``(items,)`` float64, adding up to ``count``
    """
    rates = weights.double() / weights.double().sum()
    if count >= len(rates):
        return torch.ones_like(rates)
    places, parts = (torch.as_tensor(values) for values in np.polynomial.legendre.leggauss(NODES))
    # with u = exp(-rate t) uniform for the item itself, the others' times are compared at t
    uniform = 0.5 * (places + 1)
    found = torch.empty_like(rates)
    for item, rate in enumerate(rates):
        others = torch.cat([rates[:item], rates[item + 1 :]])
        before = 1 - uniform[:, None] ** (others / rate)
        # how many of the others came before, of which only less than count matter
        counted = torch.zeros(NODES, count, dtype=torch.float64)
        counted[:, 0] = 1
        for chance in before.unbind(1):
            shifted = torch.cat([torch.zeros(NODES, 1, dtype=torch.float64), counted[:, :-1]], dim=1)
            counted = counted * (1 - chance[:, None]) + shifted * chance[:, None]
        found[item] = 0.5 * (parts * counted.sum(1)).sum()
    return found


SCHEDULES: Mapping[str, Any] = {"BlockSchedule": BlockSchedule}
