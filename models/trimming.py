"""Exact truncation of singular values of a whole weight matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.models.adapters.base import grouped_linear
from pyrolora.models.adapters.lora import stored_weight
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.serving import weight_changes
from pyrolora.models.settings import check_numbers


def trimmed(weight: Tensor, fraction: float) -> Tensor:
    """The nearest matrix with a fraction of the singular values: ``trimmed(weight, 0.5)``.

    Keeps the ``int(fraction * min(out, in))`` largest (Eckart and Young, 1936), from the exact decomposition: a randomised
    one of the same rank is off by a third in Frobenius norm where singular values fall slowly.

    Args:
        weight: the matrix.
        fraction: of its singular values, in (0, 1]; 1 returns the matrix as it is.

    Shape:
        ``(..., out, in)``, in and out

    Raises:
        ValueError: a fraction outside (0, 1], or one that keeps nothing.
    """
    _check_fraction(fraction)
    smaller = min(weight.shape[-2:])
    kept = int(smaller * fraction)
    if kept < 1:
        raise ValueError(
            f"fraction={fraction} of {smaller} singular values keeps none; choose at least {1 / smaller:.3g}."
        )
    if kept == smaller:
        return weight
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[..., :kept] * s[..., None, :kept]) @ vt[..., :kept, :]


@dataclass(frozen=True)
class Trim:
    """Which weights to truncate after a merge, and how far.

    Usage::

        with merged(model, draw, finish=Trim(0.8, targets=("fc2",)).of(model.backbone)) as network:
            ...

    The truncation of a mean is not the mean of truncations: trim each draw.

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, section 3.3, "singular value trim".

    Args:
        fraction: of the singular values of the whole merged weight that are kept.
        targets: projections to truncate, see `LoRA`.
        layers: blocks, see `LoRA`; None for all.

    Raises:
        ValueError: a fraction outside (0, 1].
    """

    fraction: float = field(metadata={"help": "of the singular values that are kept"})
    targets: tuple[str, ...] | str = field(default="all-linear", metadata={"help": "projections to truncate"})
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks; None for all"})

    def __post_init__(self) -> None:
        check_numbers(self)
        _check_fraction(self.fraction)

    def of(self, backbone: Backbone) -> "TrimmedPaths":
        """The truncation for one network.

        Raises:
            ValueError: a target or layer that the network lacks.
        """
        found = find_projections(backbone, self.targets, self.layers)
        return TrimmedPaths({path: self.fraction for members in found.values() for _, path, _ in members})


@dataclass(frozen=True)
class TrimmedPaths:
    """A function of a module's path and its weight that truncates some of them.

    Args:
        fractions: module path -> fraction of the singular values that are kept.
    """

    fractions: Mapping[str, float]

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """The weight, truncated if its path is among the chosen ones."""
        return trimmed(weight, self.fractions[path]) if path in self.fractions else weight


@torch.no_grad()
def trimmed_deltas(deltas: Mapping[str, Delta], backbone: Backbone, trim: Trim, runs: int) -> dict[str, Delta]:
    """Changes after which the chosen projections have truncated weights, without touching a weight.

    Each of equal runs of rows (a draw, a task's merge) has its whole weight ``W + change`` truncated by itself, all at once.

    Usage::

        backbone.bind(trimmed_deltas(model.deltas(draw), backbone, Trim(0.8), runs=episodes))

    Args:
        deltas: changes of the draw, by module path.
        backbone: the frozen network.
        trim: which weights, and how far; paths without a change stay as they are.
        runs: number of runs.
    """
    chosen = trim.of(backbone).fractions
    found: dict[str, Delta] = dict(deltas)
    for path in deltas.keys() & chosen.keys():
        weight = stored_weight(backbone, path)
        changed = trimmed(weight + weight_changes(deltas[path], weight, runs), chosen[path])
        found[path] = _DenseDelta(changed - weight)
    return found


@dataclass(frozen=True)
class _DenseDelta:
    change: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return grouped_linear(rows.to(self.change.dtype), self.change).to(rows.dtype)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is a share of the singular values in (0, 1]; got {fraction}. 1 keeps them all.")
