"""Geometry of matrices with orthonormal columns, at rank-by-rank cost and batched over leading dimensions.

A point is ``Z`` of shape ``(..., rows, rank)`` with ``Z' Z = I``. No function here forms a rows-by-rows matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# squared singular values further apart than this lose digits in one pass over a float32 Gram matrix
ILL_CONDITIONED = 1e-6
# of a landing step: distance |Z'Z - I|_F that the safe step never exceeds
SAFE_DISTANCE = 0.5


def orthogonality_error(point: Tensor) -> Tensor:
    """Frobenius norm of ``Z' Z - I``: ``orthogonality_error(x).max()``.

    Shape:
        ``(...)`` from ``(..., rows, rank)``
    """
    return (_gram(point) - _identity(point)).norm(dim=(-2, -1))


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm, 0 for a zero matrix.

    For orthonormal X and Y the stable rank of ``X Theta Y'`` is that of ``Theta``, a rank-by-rank computation.

    Shape:
        ``(...)`` from ``(..., rows, columns)``
    """
    values = torch.linalg.svdvals(matrix).square()
    return values.sum(-1) / values[..., 0].clamp_min(torch.finfo(values.dtype).tiny)


def uniform_point(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A draw from the uniform (Haar) distribution: ``uniform_point(30, 576, 8)``.

    The polar factor of a matrix of independent normals is uniform, because both are invariant to rotations.

    Args:
        shape: ``(..., rows, rank)``.
        generator: a CPU generator.
        dtype: type of the result.
        device: where the result lives.
    """
    # in double precision: a wide square Gaussian matrix is often ill-conditioned
    normal = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return project(normal).to(device, dtype)


def project(matrix: Tensor) -> Tensor:
    """The closest matrix with orthonormal columns: the polar factor, by an eigendecomposition of the Gram matrix.

    ``B (B' B)^(-1/2)``, repeated where the Gram matrix is too ill-conditioned for one pass. Source: Higham, "Computing the
    polar decomposition", 1986.

    Shape:
        ``(..., rows, rank)``, of full column rank
    """
    factor, smallest = _polar_pass(matrix)
    # the second pass also removes the rounding of the first, which grows with the spread of the singular values
    if bool((smallest < ILL_CONDITIONED).any()):
        factor, _ = _polar_pass(factor)
    # one Newton-Schulz step squares what error is left, at the cost of one more Gram matrix
    return newton_schulz_step(factor)


def _polar_pass(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_gram(matrix).double())
    largest = values[..., -1:]
    values = values.clamp_min(torch.finfo(matrix.dtype).eps ** 2 * largest)
    inverse_root = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return matrix @ inverse_root.to(matrix.dtype), values[..., 0] / largest[..., 0]


def newton_schulz_step(matrix: Tensor) -> Tensor:
    """``B (3 I - B' B) / 2``: one step to the polar factor, for singular values below the square root of three."""
    return matrix @ (1.5 * _identity(matrix) - 0.5 * _gram(matrix))


def tangent_projection(point: Tensor, ambient: Tensor) -> Tensor:
    """Orthogonal projection onto the tangent space: ``V - Z sym(Z' V)``.

    Source: Absil, Mahony and Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, example 3.6.2.

    Shape:
        both ``(..., rows, rank)``
    """
    product = point.mT @ ambient
    return ambient - point @ (0.5 * (product + product.mT))


def canonical_gradient(point: Tensor, gradient: Tensor) -> Tensor:
    """Riemannian gradient of the canonical metric: ``G - Z G' Z``.

    Source: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints", 1998, equation 2.53.

    Shape:
        both ``(..., rows, rank)``
    """
    return gradient - point @ (gradient.mT @ point)


def landing_field(point: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    """``(G Z' - Z G') Z + penalty Z (Z' Z - I)``, multiplied out so that only rank-by-rank matrices appear.

    The first part is tangent to the level set of ``Z' Z`` anywhere, the second attracts to the manifold; they are
    orthogonal. Papers put a factor of a half before the first and sometimes a quarter into the second: their penalties are
    not ours.

    Source: Ablin, Vary, Gao and Absil, "Infeasible deterministic, stochastic, and variance-reduction algorithms for
    optimization under orthogonality constraints", 2023; Lion et al., "PoLAR", 2025.

    Args:
        point: need not be on the manifold.
        gradient: Euclidean gradient there.
        penalty: weight of the attraction.

    Shape:
        both ``(..., rows, rank)``
    """
    gram = _gram(point)
    tangent = gradient @ gram - point @ (gradient.mT @ point)
    return tangent + penalty * (point @ (gram - _identity(point)))


def safe_step(point: Tensor, field: Tensor, penalty: float, distance: float = SAFE_DISTANCE) -> Tensor:
    """Largest step along minus a landing field after which ``|Z' Z - I|_F`` is surely at most ``distance``.

    Follows from the exact recursion ``D+ = D - 2 s p (D + D^2) + s^2 F' F`` of ``D = Z' Z - I`` under a step s.

    Args:
        point: where the step starts, not further than ``distance`` from the manifold.
        field: what `landing_field` returned there, for whatever gradient.
        penalty: as in `landing_field`.
        distance: bound to keep.

    Shape:
        ``(...)`` from ``(..., rows, rank)``
    """
    now = orthogonality_error(point)
    speed = field.square().sum((-2, -1)).clamp_min(torch.finfo(field.dtype).tiny)
    pull = penalty * now * (1 - now)
    room = (distance - now).clamp_min(0)
    return ((pull + (pull.square() + speed * room).sqrt()) / speed).clamp_max(1 / (2 * penalty))


def retract_polar(point: Tensor, tangent: Tensor) -> Tensor:
    """The closest point to ``Z + V``; equivariant to rotations of the columns."""
    return project(point + tangent)


def retract_cholesky_qr(point: Tensor, tangent: Tensor) -> Tensor:
    """The Q of ``Z + V`` by two rounds of Cholesky: fast on a GPU, for steps that leave ``Z + V`` well-conditioned."""
    moved = point + tangent
    for _ in range(2):
        factor = torch.linalg.cholesky(_gram(moved))
        moved = torch.linalg.solve_triangular(factor.mT, moved, upper=True, left=False)
    return moved


def retract_qr(point: Tensor, tangent: Tensor) -> Tensor:
    """The Q of ``Z + V`` with a positive diagonal of R, without which it would jump between signs."""
    orthonormal, upper = torch.linalg.qr(point + tangent)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(orthonormal)
    return orthonormal * signs[..., None, :]


def retract_newton_schulz(point: Tensor, tangent: Tensor) -> Tensor:
    """Five Newton-Schulz steps from ``Z + V``: products only, accurate for steps that are short of norm one."""
    moved = point + tangent
    # any singular value of Z + V is at least one, and the iteration needs all below the square root of three
    norm = torch.linalg.matrix_norm(tangent)[..., None, None]
    moved = moved / (1 + norm.square()).sqrt()
    for _ in range(5):
        moved = newton_schulz_step(moved)
    return moved


def retract_cayley(point: Tensor, tangent: Tensor) -> Tensor:
    """The Cayley transform along ``V``, by a solve of twice the rank instead of one of the rows.

    Source: Wen and Yin, "A feasible method for optimization with orthogonality constraints", 2013, lemma 4.
    """
    horizontal = tangent - 0.5 * (point @ (point.mT @ tangent))
    left = torch.cat([horizontal, point], dim=-1)
    right = torch.cat([point, -horizontal], dim=-1)
    inner = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device) - 0.5 * (right.mT @ left)
    return point + left @ torch.linalg.solve(inner, right.mT @ point)


RETRACTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "polar": retract_polar,
    "cholesky_qr": retract_cholesky_qr,
    "qr": retract_qr,
    "newton_schulz": retract_newton_schulz,
    "cayley": retract_cayley,
}


def _gram(matrix: Tensor) -> Tensor:
    return matrix.mT @ matrix


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
