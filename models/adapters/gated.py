"""The one low-rank change that every adapter with factors is made of, with a gate on its rank, and what gates read."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from pyrolora.models.adapters.base import site_linear
from pyrolora.models.local import LocalWeight


@dataclass(frozen=True)
class MissingGate:
    """Stands for a gate whose input a batch does not hold; the first forward that needs it says so.

    Usage::

        gate = MissingGate("MixtureLoRA", "sequence")

    An adapter is asked for its changes also where there is no batch: to check constants, or to merge a draw.

    Args:
        adapter: name of the adapter.
        key: the entry of a batch that the gate is made from.
    """

    adapter: str
    key: str

    def error(self) -> ValueError:
        """What is missing, and where it belongs."""
        return ValueError(
            f"The gate of {self.adapter} is made from the batch entry {self.key!r}, and this forward has none. Put a tensor "
            f"with one row an example under {self.key!r} in the batch; to merge, give the one row that the merged network "
            f"is for, as in merged(model, draw, {{{self.key!r}: row[None]}})."
        )


RankGate: TypeAlias = Tensor | MissingGate | None


@dataclass(frozen=True)
class LowRankDelta:
    """``x -> scale * B diag(gate) A x``, with one gate for all rows, one a run of rows, or one a token.

    Usage::

        LowRankDelta(a, b, 2.0, "q_proj.lora_A", "q_proj.lora_B", entry=3, gate=weights)(rows)

    Everything that it reads is bound when it is made, so a forward that runs again during backward (gradient checkpointing),
    or beside another one in a second thread, sees the same gate.

    Args:
        down: A of one entry of the stack, ``(rank, in)`` or ``(groups, rank, in)``.
        up: B of the same entry, ``(out, rank)`` or ``(groups, out, rank)``.
        scale: what multiplies the product.
        down_site: name of A's site.
        up_site: name of B's site.
        entry: position in both stacks.
        gate: multiplies the rank's activations; None for one.

    Shape:
        gate ``(rank,)``; ``(runs, rank)`` or ``(runs, tokens, rank)``, where the rows are ``runs`` equal runs that share a
        gate each: one for every draw, every example, or every example whose beams stand together. Maps ``(rows, tokens,
        in)`` to ``(rows, tokens, out)``.
    """

    down: Tensor | LocalWeight
    up: Tensor | LocalWeight
    scale: float
    down_site: str
    up_site: str
    entry: int
    gate: RankGate = None

    def __call__(self, rows: Tensor) -> Tensor:
        """The change of the projection's output, in the type of the rows.

        Raises:
            ValueError: rows that do not divide into the gate's runs, or a gate whose input is missing.
        """
        # between the factors there are only `rank` activations a token to scale and to gate
        narrow = site_linear(rows, self.down, self.down_site, self.entry) * self.scale
        if self.gate is not None:
            narrow = gated(narrow, self.gate)
        return site_linear(narrow, self.up, self.up_site, self.entry).to(rows.dtype)


def gated(narrow: Tensor, gate: Tensor | MissingGate) -> Tensor:
    """Activations of the rank times a gate.

    Args:
        narrow: activations between the factors.
        gate: see `LowRankDelta`.

    Shape:
        narrow and result ``(rows, tokens, rank)``

    Raises:
        ValueError: see `LowRankDelta`.
    """
    if isinstance(gate, MissingGate):
        raise gate.error()
    if gate.dim() == 1:
        return narrow * gate
    rows, runs = narrow.shape[0], gate.shape[0]
    if rows % runs:
        raise ValueError(
            f"There are gates for {runs} rows, and the forward has {rows}. Give one gate for all rows, or one for each; "
            "weights merged into a network can hold one only."
        )
    whole = gate[:, None] if gate.dim() == 2 else gate
    return narrow * (whole if runs == rows else whole.repeat_interleave(rows // runs, dim=0))


def over_rank(weights: Tensor, rank: int) -> Tensor:
    """The gate that gives each of equal slices of the rank one weight: ``over_rank(expert_weights, 8)``.

    ``sum_k w_k B_k A_k`` is ``B diag(w (x) 1) A`` with the experts' factors side by side along the rank, so neither a mixture
    nor a pool ever forms a product of each member.

    Args:
        weights: a weight for each member.
        rank: all members' ranks together.

    Shape:
        ``(..., members)`` to ``(..., rank)``

    Raises:
        ValueError: the members do not divide the rank.
    """
    members = weights.shape[-1]
    if rank % members:
        raise ValueError(
            f"{members} members do not divide the rank {rank}; choose a rank that is a multiple of {members}."
        )
    return weights.repeat_interleave(rank // members, dim=-1)
