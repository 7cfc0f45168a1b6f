"""Weights that are never drawn as a whole: only their products with activations are random, anew for every token."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LocalWeight(ABC):
    """Stands in a draw for the weights of linear maps; an adapter may take it apart and multiply with it, nothing else.

    Usage::

        draw = {"q_proj.lora_A": local_weight(factor.distribution(), "token"), ...}
        model.row_logits(batch, draw)
    """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the weights."""

    @abstractmethod
    def entries(self) -> Sequence["LocalWeight"]:
        """One for each matrix of a stack."""

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """``rows @ weight.T`` with a weight of its own for every token, ``(rows, tokens, out)``."""

    def unbind(self, dim: int = -3) -> Sequence["LocalWeight"]:
        """See `entries`; the name by which an adapter takes a stack of weights apart."""
        return self.entries()

    def dim(self) -> int:
        """Dimensions of one matrix: there is no dimension of draws."""
        return 2

    def __getattr__(self, name: str) -> Any:
        """Refuse any other use."""
        raise AttributeError(
            f"Noise for each token has no weights to take {name!r} of, only products with activations; an adapter that "
            "computes with its weights first cannot have it. Use noise='example' or noise='weight'."
        )
