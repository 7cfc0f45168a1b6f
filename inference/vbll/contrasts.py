"""Normals of a last layer's contrasts between classes, as `optimum` moves them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.inference.vbll.natural import BlockRows, Whitened


@dataclass(frozen=True)
class ContrastRows(BlockRows):
    """The whitened posterior of `ClassContrasts`: independent rows of which only contrasts count, the rest as in the prior.

    With precisions A_k of the rows, the KL to the standard Normal is ``((1 - 1/C) sum tr A_k^-1 + |m - mean(m)|^2
    - (C - 1) d + sum log|A_k| - log|mean(A)|) / 2``, the last term being the shift's. Its gradient in ``A_k^-1`` vanishes,
    together with the likelihood's, where ``A_k = (1 - 1/C) I + X' diag(w_k) X + A_k (sum A)^-1 A_k``, and going from A_k
    towards the right-hand side lowers the loss.
    """

    @staticmethod
    def at_prior(white: Whitened) -> "ContrastRows":
        """What is known before the data."""
        rows, span = white.loc.shape[0], white.inputs.shape[-1]
        eye = torch.eye(span).to(white.inputs)
        return ContrastRows(white.inputs.new_zeros(rows, span), eye.expand(rows, span, span))

    def divergence(self, roots: Tensor) -> Tensor:
        """See `Rows.divergence`."""
        count, span = self.mean.shape
        trace = torch.cholesky_inverse(roots).diagonal(dim1=-2, dim2=-1).sum()
        log_precision = 2 * roots.diagonal(dim1=-2, dim2=-1).log().sum()
        log_mean = 2 * torch.linalg.cholesky(self.precision.mean(0)).diagonal().log().sum()
        misfit = self.counted(self.mean).square().sum()
        return 0.5 * ((1 - 1 / count) * trace + misfit - (count - 1) * span + log_precision - log_mean)

    def target(self, seen: Tensor) -> Tensor:
        """See `BlockRows.target`."""
        shared = torch.cholesky_solve(self.precision, torch.linalg.cholesky(self.precision.sum(0)))
        return (1 - 1 / len(self.mean)) * torch.eye(seen.shape[-1]).to(seen) + seen + self.precision @ shared

    def counted(self, rows: Tensor) -> Tensor:
        """See `BlockRows.counted`: without the rows' mean."""
        return rows - rows.mean(0)
