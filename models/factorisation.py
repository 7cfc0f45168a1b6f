"""Truncated factorisations of a weight matrix, from which factored adapters start."""

import math

import torch
from torch import Tensor

# |C C^-1 - I|_F above this is no inverse; the damping is doubled until it is below
INVERSE_ERROR = 0.05


def scaled_factors(u: Tensor, s: Tensor, vt: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with ``scaling * B A = U diag(s) Vt``, the roots of the singular values on either side.

    Args:
        u: left directions.
        s: singular values.
        vt: right directions.
        scaling: what multiplies the product.

    Shape:
        u ``(out, rank)``, s ``(rank,)``, vt ``(rank, in)``; returns ``(rank, in)`` and ``(out, rank)``.
    """
    root = (s / scaling).sqrt()
    return root[:, None] * vt, u * root


def principal_factors(
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    iterations: int | None = None,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B whose scaled product holds the largest singular values of a matrix.

    Usage::

        a, b = principal_factors(layer.weight, 8, 2.0)
        residual = layer.weight - 2.0 * b @ a

    Source: Meng et al., "PiSSA", 2024, equations 2 to 4; the randomised form is Halko et al., "Finding structure with
    randomness", 2011, algorithm 4.4.

    Args:
        weight: the matrix, at least float32.
        rank: number of singular values.
        scaling: what will multiply ``B A``.
        iterations: power iterations of a randomised decomposition; None for the exact one.
        oversampling: directions that the randomised form keeps beside the ``rank`` wanted ones.
        generator: source of the random directions.

    Shape:
        weight ``(out, in)``; returns ``(rank, in)`` and ``(out, rank)``.
    """
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vt = randomised_svd(weight, rank + oversampling, iterations, generator)
    return scaled_factors(u[:, :rank], s[:rank], vt[:rank], scaling)


def randomised_svd(
    weight: Tensor, width: int, iterations: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration, orthonormalised after every product.

    Args:
        weight: the matrix.
        width: width of the subspace.
        iterations: products with ``W W'``.
        generator: source of the start, a CPU generator.

    Shape:
        weight ``(out, in)``; returns ``(out, width)``, ``(width,)`` and ``(width, in)``, width cut to the smaller side.
    """
    width = min(width, *weight.shape)
    # drawn on the CPU in float64, so that every device and float type starts from the same subspace
    start = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float64).to(weight)
    basis, _ = torch.linalg.qr(weight @ start)
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(weight.mT @ basis)
        basis, _ = torch.linalg.qr(weight @ basis)
    u, s, vt = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    return basis @ u, s, vt


def balanced_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of equal size: ``A A' = B' B``, diagonal and descending.

    Args:
        a: right factor.
        b: left factor.

    Shape:
        ``(rank, in)`` and ``(out, rank)``, returned in this order.
    """
    left, core_left = torch.linalg.qr(b)
    right, core_right = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(core_left @ core_right.mT)
    return scaled_factors(left @ u, s, vt @ right.mT, 1.0)


def damped_inverse(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``C + damping mean(diag C) I`` and its inverse, the damping doubled until the inverse is one.

    Source: Yang et al., "CorDA", 2024, the safeguard of section 3.2.

    Args:
        moment: second moment of the inputs, any scale.
        damping: first damping, relative to the mean of the diagonal.

    Shape:
        ``(in, in)``, twice.

    Raises:
        ValueError: the moment is zero or not finite.
    """
    mean = moment.diagonal().mean()
    if not (torch.isfinite(moment).all() and mean > 0):
        raise ValueError(
            f"The second moment of the inputs has a mean diagonal of {float(mean)}; it must be positive and finite. "
            "Give calibration text that reaches this projection."
        )
    eye = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    while math.isfinite(damping):
        damped = moment + damping * mean * eye
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(root)
            if torch.linalg.matrix_norm(damped @ inverse - eye) < INVERSE_ERROR:
                return damped, inverse
        damping *= 2
    raise ValueError("The second moment of the inputs cannot be inverted under any damping; it is no covariance.")


def context_factors(
    weight: Tensor, moment: Tensor, rank: int, scaling: float, *, leading: bool, damping: float, balanced: bool
) -> tuple[Tensor, Tensor]:
    """A and B from the decomposition of a weight seen through the second moment of its inputs.

    ``W C = U S V'`` gives ``W = U S (V' C^-1)``; the leading components carry the most output on inputs like those of C,
    the last ones the least.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation", 2024, equations 2 to 4.

    Args:
        weight: the matrix, float64 recommended.
        moment: second moment C of its inputs, of the same type.
        rank: number of components.
        scaling: what will multiply ``B A``.
        leading: take the first components (instruction-previewed) or the last (knowledge-preserved).
        damping: see `damped_inverse`.
        balanced: give A and B equal size; else C's own arbitrary scale is on A.

    Shape:
        weight ``(out, in)``, moment ``(in, in)``; returns ``(rank, in)`` and ``(out, rank)``.
    """
    damped, inverse = damped_inverse(moment, damping)
    u, s, vt = torch.linalg.svd(weight @ damped, full_matrices=False)
    kept = slice(0, rank) if leading else slice(s.shape[0] - rank, None)
    a, b = scaled_factors(u[:, kept], s[kept], vt[kept] @ inverse, scaling)
    return balanced_factors(a, b) if balanced else (a, b)
