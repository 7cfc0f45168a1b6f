"""Structures of the curvature of one site: what is summed over the data, and its eigenbasis."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyrolora.guides.kronecker import rotate
from pyrolora.inference.logit_gradients import Product, site_gradient
from pyrolora.models.sites import Site


@dataclass(frozen=True)
class Block:
    """Gradients of a batch in one part of the eigenbasis.

    Attributes:
        vectors: ``(columns, rows, directions)``.
        eigenvalues: curvature in each direction, ``(directions,)``.
        precision: prior precision in each direction, broadcasts to ``(directions,)``.
        replaces_prior: whether the part corrects a share that another part counted with the prior alone.
    """

    vectors: Tensor
    eigenvalues: Tensor
    precision: Tensor
    replaces_prior: bool = False

    def covariance(self, factor: float) -> Tensor:
        """``J Sigma J'`` of the part, with the prior precision times a factor, ``(rows, columns, columns)``."""
        precision = self.precision * factor
        variance = 1 / (self.eigenvalues + precision)
        if self.replaces_prior:
            variance = variance - 1 / precision
        rows_first = self.vectors.transpose(0, 1)
        return (rows_first * variance) @ rows_first.mT


class BatchMoments:
    """``sum_nt a a'`` of the activations of one batch, formed once for maps that read the same ones."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        """Sum over rows and tokens, ``(in, in)`` from ``(rows, tokens, in)``."""
        if id(inputs) not in self._known:
            rows = inputs.flatten(0, 1)
            self._known[id(inputs)] = inputs, rows.mT @ rows
        return self._known[id(inputs)][1]


class Eigenbases:
    """Leading eigenpairs of stacks of matrices, found once for sites whose sums are the same."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, tuple[Tensor, Tensor]]] = []

    def __call__(self, stack: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """The ``rank`` largest eigenvalues, in ascending order, and their eigenvectors; all of them for None.

        Shape:
            ``(entries, rank)`` and ``(entries, side, rank)`` from ``(entries, side, side)``
        """
        kept = stack.shape[-1] if rank is None else min(rank, stack.shape[-1])
        for other, size, pairs in self._known:
            if size == kept and other.shape == stack.shape and torch.equal(other, stack):
                return pairs
        values, vectors = stack.new_empty(*stack.shape[:-1])[:, -kept:], torch.empty_like(stack)[..., -kept:]
        # entry by entry, so that no second stack is held in float64
        for entry, matrix in enumerate(stack):
            own, basis = torch.linalg.eigh(matrix.double())
            values[entry], vectors[entry] = own[-kept:].clamp_min(0), basis[:, -kept:]
        self._known.append((stack, kept, (values, vectors)))
        return values, vectors


class Structure(ABC):
    """Curvature of one site, summed over the data, and what is read off it.

    Args:
        site: the site.
    """

    name: ClassVar[str]

    def __init__(self, site: Site) -> None:
        self.site = site

    @abstractmethod
    def add(self, products: list[Product]) -> None:
        """Add one `hessian_root` column of a batch: a product for each entry of the site's stack."""

    def add_inputs(self, products: list[Product], moments: "BatchMoments") -> None:  # noqa: B027 - most need none
        """Add what does not depend on the column, once a batch."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The sums, by name; `add` changes them in place."""

    @abstractmethod
    def decompose(self, eigenbases: Eigenbases) -> None:
        """Find eigenvalues and eigenvectors of the finished sums."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Eigenvalues, with the entries of the stack first, ``(entries, directions)``."""

    @abstractmethod
    def blocks(self, jacobian: Tensor, precision: Tensor) -> Iterator[Block]:
        """Gradients of a batch in the eigenbasis.

        Args:
            jacobian: gradients of the site's weights, ``(columns, rows, *site.shape)``.
            precision: prior precision that `takes` accepts.
        """

    def takes(self, precision: Tensor) -> bool:
        """Whether the eigenbasis serves this prior precision: by default only one number for the whole site."""
        return precision.numel() == 1


class Diagonal(Structure):
    """The diagonal alone: every weight by itself."""

    name = "diag"

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site)
        self.total = torch.zeros(site.shape, dtype=dtype, device=device)

    def add(self, products: list[Product]) -> None:
        """See `Structure.add`."""
        entries = self.total if self.site.modules else self.total[None]
        for entry, product in zip(entries, products, strict=True):
            entry += product.weights().square().sum(0)

    def state(self) -> dict[str, Tensor]:
        """See `Structure.state`."""
        return {"total": self.total}

    def decompose(self, eigenbases: Eigenbases) -> None:
        """Nothing to do: the diagonal is its own eigenbasis."""

    def eigenvalues(self) -> Tensor:
        """See `Structure.eigenvalues`."""
        return self.total.flatten(1) if self.site.modules else self.total.flatten()[None]

    def blocks(self, jacobian: Tensor, precision: Tensor) -> Iterator[Block]:
        """See `Structure.blocks`."""
        yield Block(jacobian.flatten(2), self.total.flatten(), precision.expand(self.site.shape).flatten())

    def takes(self, precision: Tensor) -> bool:
        """Any precision: see `Structure.takes`."""
        return True


class Dense(Structure):
    """Every pair of weights of the site, entries of a stack together."""

    name = "full"

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(site)
        self.total = torch.zeros(site.numel, site.numel, dtype=dtype, device=device)

    def add(self, products: list[Product]) -> None:
        """See `Structure.add`."""
        flat = site_gradient(products, self.site).flatten(1)
        self.total += flat.mT @ flat

    def state(self) -> dict[str, Tensor]:
        """See `Structure.state`."""
        return {"total": self.total}

    def decompose(self, eigenbases: Eigenbases) -> None:
        """See `Structure.decompose`."""
        values, basis = eigenbases(self.total[None], None)
        self.values, self.basis = values[0], basis[0]

    def eigenvalues(self) -> Tensor:
        """See `Structure.eigenvalues`."""
        return self.values[None]

    def blocks(self, jacobian: Tensor, precision: Tensor) -> Iterator[Block]:
        """See `Structure.blocks`."""
        yield Block(jacobian.flatten(2) @ self.basis, self.values, precision)


class Kronecker(Structure):
    """Kronecker factors of every entry: input second moments and output-gradient second moments, over all tokens.

    For an entry with N examples of T_n tokens the curvature is approximated by ``G kron A`` with
    ``A = sum_nt a a' / sum_n T_n`` and ``G = sum_ntc g g'``, each token taken as a sample of its own.

    Source: Martens and Grosse, 2015; Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural
    Network Architectures", 2023 (the expand setting).

    Args:
        site: the site.
        dtype: type of the sums.
        device: where they live.
        rank: eigenvectors kept of a side longer than it; the rest of that side counts as flat. None keeps all.
    """

    name = "kron"

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device, rank: int | None = None) -> None:
        super().__init__(site)
        self.rank = rank
        entries = site.shape[0] if site.modules else 1
        out_features, in_features = site.shape[-2:]
        self.inputs = torch.zeros(entries, in_features, in_features, dtype=dtype, device=device)
        self.outputs = torch.zeros(entries, out_features, out_features, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64)

    def add(self, products: list[Product]) -> None:
        """See `Structure.add`."""
        for total, product in zip(self.outputs, products, strict=True):
            gradients = product.gradients.flatten(0, 1)
            total.addmm_(gradients.mT, gradients)

    def add_inputs(self, products: list[Product], moments: BatchMoments) -> None:
        """See `Structure.add_inputs`."""
        for total, product in zip(self.inputs, products, strict=True):
            total += moments(product.inputs)
        self.tokens += products[0].tokens

    def state(self) -> dict[str, Tensor]:
        """See `Structure.state`."""
        return {"inputs": self.inputs, "outputs": self.outputs, "tokens": self.tokens}

    def decompose(self, eigenbases: Eigenbases) -> None:
        """See `Structure.decompose`."""
        in_totals, self.in_basis = eigenbases(self.inputs, self.rank)
        self.in_values = in_totals / self.tokens.to(in_totals)
        self.out_values, self.out_basis = eigenbases(self.outputs, self.rank)

    @property
    def truncated(self) -> bool:
        """Whether directions were left out of the basis."""
        return self.in_basis.shape[-1] < self.in_basis.shape[-2] or self.out_basis.shape[-1] < self.out_basis.shape[-2]

    def products_of_eigenvalues(self) -> Tensor:
        """Curvature of each pair of directions, ``(entries, out directions, in directions)``."""
        return self.out_values[..., None] * self.in_values[:, None]

    def eigenvalues(self) -> Tensor:
        """See `Structure.eigenvalues`; directions that were left out are zeros."""
        kept = self.products_of_eigenvalues().flatten(1)
        left_out = self.site.shape[-1] * self.site.shape[-2] - kept.shape[1]
        return torch.cat([kept, kept.new_zeros(kept.shape[0], left_out)], dim=1)

    def blocks(self, jacobian: Tensor, precision: Tensor) -> Iterator[Block]:
        """See `Structure.blocks`."""
        pairs = self.products_of_eigenvalues()
        if self.truncated:
            whole = jacobian.flatten(2)
            yield Block(whole, whole.new_zeros(()), precision.expand(self.site.shape).flatten())
        stacked = jacobian if self.site.modules else jacobian[:, :, None]
        rotated = rotate(stacked, self.out_basis, self.in_basis)
        yield Block(
            rotated.flatten(2), pairs.flatten(), precision.expand(pairs.shape).flatten(), replaces_prior=self.truncated
        )

    def takes(self, precision: Tensor) -> bool:
        """One number, or one for each entry of the stack: see `Structure.takes`."""
        return precision.numel() == 1 or precision.shape == (self.inputs.shape[0], 1, 1)


def logit_covariance(
    structures: Mapping[str, Structure],
    jacobians: Mapping[str, Tensor],
    precisions: Mapping[str, Tensor],
    factors: tuple[float, ...],
) -> Tensor:
    """``J Sigma J'`` of every row, summed over sites, for several factors on the prior precision.

    Args:
        structures: site name -> decomposed curvature.
        jacobians: site name -> gradients of functions of the logits, ``(columns, rows, *site.shape)``.
        precisions: site name -> prior precision.
        factors: factors on all prior precisions.

    Shape:
        ``(rows, factors, columns, columns)``
    """
    parts = [
        torch.stack([block.covariance(factor) for factor in factors], dim=1)
        for name, structure in structures.items()
        for block in structure.blocks(jacobians[name], precisions[name])
    ]
    return torch.stack(parts).sum(0)
