"""Four-bit NormalFloat rounding, and low-rank factors that take over part of its error."""

from functools import cache

import torch
from torch import Tensor

from pyrolora.models.factorisation import principal_factors

# weights that share one scale
BLOCK = 64
METHODS = ("pissa", "loftq")


@cache
def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat: quantiles of a Normal, scaled to [-1, 1], with an exact zero; float64, ascending.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, equation 4 and appendix E.
    """
    outermost = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    halves = [torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64)) for count in (9, 8)]
    levels = torch.cat([halves[0][:-1], -halves[1]]).sort().values
    return levels / levels.max()


def nf4(weight: Tensor) -> Tensor:
    """A matrix rounded to 4-bit NormalFloat, in blocks of 64 weights along its rows, and back in its own float type.

    Usage::

        error = torch.linalg.matrix_norm(weight - nf4(weight), "nuc")

    Args:
        weight: any shape; the last block may be short.
    """
    flat = weight.flatten().to(torch.promote_types(weight.dtype, torch.float32))
    missing = -len(flat) % BLOCK
    blocks = torch.cat([flat, flat.new_zeros(missing)]).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = nf4_levels().to(blocks)
    relative = blocks / torch.where(scale > 0, scale, 1)
    nearest = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
    rounded = (levels[nearest] * scale).flatten()
    return rounded[: len(flat)].reshape(weight.shape).to(weight.dtype)


def quantised_factors(
    weight: Tensor, rank: int, scaling: float, *, method: str, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Q in NF4, and A and B, such that ``Q + scaling B A`` is close to a matrix.

    Both methods alternate a rounding and a decomposition. ``"pissa"`` decomposes first and ends on the rounding (QPiSSA, so
    the trained factors stay principal); ``"loftq"`` rounds first and ends on the decomposition of the rounding error.

    Source: Meng et al., "PiSSA", 2024, section 4; Li et al., "LoftQ", 2023, algorithm 1.

    Args:
        weight: the matrix.
        rank: rank of the product.
        scaling: what will multiply it.
        method: ``"pissa"`` or ``"loftq"``.
        iterations: alternations.

    Shape:
        weight ``(out, in)``; returns ``(out, in)``, ``(rank, in)`` and ``(out, rank)``.
    """
    rounded = product = torch.zeros_like(weight)
    for _ in range(iterations):
        if method == "loftq":
            rounded = nf4(weight - product)
        a, b = principal_factors(weight - rounded, rank, scaling)
        product = scaling * b @ a
        if method == "pissa":
            rounded = nf4(weight - product)
    return rounded, a, b
