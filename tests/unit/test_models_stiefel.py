"""Stiefel geometry against dense formulas, exact recursions and torch's SVD and QR, in float64 unless said."""

import math

import pytest
import torch

from pyrolora.models.stiefel import (
    RETRACTIONS,
    canonical_gradient,
    landing_field,
    newton_schulz_step,
    orthogonality_error,
    project,
    retract_polar,
    retract_qr,
    safe_step,
    stable_rank,
    tangent_projection,
    uniform_point,
)
from pyrolora.models.uniform_stiefel import UniformStiefel, stiefel

ROWS, RANK = 300, 8


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def point(*shape):
    return uniform_point(*shape, dtype=torch.float64)


def off_manifold(rows=ROWS, rank=RANK):
    return point(rows, rank) + 0.05 * normal(rows, rank) / rows**0.5


def polar_by_svd(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


class TestLandingField:
    def test_it_equals_the_form_with_matrices_of_the_size_of_the_rows(self):
        z, g = off_manifold(), normal(ROWS, RANK)
        dense = (g @ z.mT - z @ g.mT) @ z + 0.7 * z @ (z.mT @ z - torch.eye(RANK))
        assert (landing_field(z, g, 0.7) - dense).abs().max() < 1e-11

    def test_its_first_part_is_tangent_to_the_level_set_and_orthogonal_to_the_second(self):
        z, g = off_manifold(), normal(ROWS, RANK)
        tangent = landing_field(z, g, 0.0)
        attraction = z @ (z.mT @ z - torch.eye(RANK))
        assert (tangent.mT @ z + z.mT @ tangent).abs().max() < 1e-11
        cosine = (tangent * attraction).sum() / (tangent.norm() * attraction.norm())
        assert cosine.abs() < 1e-14

    def test_on_the_manifold_it_is_the_canonical_gradient_and_half_of_it_is_almost_the_euclidean_one(self):
        z, g = point(ROWS, RANK), normal(ROWS, RANK)
        field = landing_field(z, g, 0.0)
        assert (field - canonical_gradient(z, g)).abs().max() < 1e-13
        outside = g - z @ (z.mT @ g)
        assert (0.5 * field + 0.5 * outside - tangent_projection(z, g)).abs().max() < 1e-13

    def test_the_recursion_of_the_distance_is_exact(self):
        z, g, step, penalty = off_manifold(40, 6), normal(40, 6), 0.03, 0.8
        eye = torch.eye(6, dtype=torch.float64)
        field = landing_field(z, g, penalty)
        moved = z - step * field
        d = z.mT @ z - eye
        expected = d - 2 * step * penalty * (d + d @ d) + step**2 * field.mT @ field
        assert (moved.mT @ moved - eye - expected).abs().max() < 1e-13

    @pytest.mark.parametrize("penalty", [0.3, 1.0, 5.0])
    def test_the_safe_step_keeps_the_distance_whatever_the_gradient(self, penalty):
        z, largest = point(50, 5), 0.0
        for k in range(60):
            field = landing_field(z, 10 ** (k % 4) * normal(50, 5), penalty)
            z = z - safe_step(z, field, penalty)[..., None, None] * field
            largest = max(largest, float(orthogonality_error(z)))
        # the bound is reached, so it is neither broken nor idle
        assert 0.3 < largest <= 0.5 + 1e-12

    def test_half_a_step_of_the_penalty_is_newton_schulz(self):
        z = 1.2 * point(40, 4)
        for _ in range(5):
            z, other = z - 0.5 * landing_field(z, torch.zeros_like(z), 1.0), newton_schulz_step(z)
            assert (z - other).abs().max() < 1e-15
        assert (torch.linalg.svdvals(z).square() - 1).abs().max() < 1e-10

    def test_a_tenth_of_a_step_of_the_penalty_takes_98_steps(self):
        z, steps = 1.2 * point(40, 4), 0
        while (torch.linalg.svdvals(z).square() - 1).abs().max() > 1e-10:
            z, steps = z - 0.1 * landing_field(z, torch.zeros_like(z), 1.0), steps + 1
        assert abs(steps - 98) <= 1

    def test_the_steady_distance_is_bounded_by_speed_over_penalty(self):
        z, step, rows, rank = point(60, 6), 0.02, 60, 6
        distances, bounds = [], []
        for k in range(1500):
            g = normal(rows, rank)
            field = landing_field(z, g / g.norm() * 2, 1.0)
            z = z - step * field
            if k > 500:
                distances.append(float(orthogonality_error(z)))
                bounds.append(step * float(field.square().sum()) / 2)
        mean, bound = sum(distances) / len(distances), sum(bounds) / len(bounds)
        # directions that spread the field's singular values over the rank make the distance the bound over its root
        assert mean <= bound
        assert mean == pytest.approx(bound / math.sqrt(rank), rel=0.25)


class TestRetractions:
    @pytest.mark.parametrize("name", RETRACTIONS)
    def test_they_start_at_the_point_and_follow_the_tangent_to_first_order(self, name):
        retract, z = RETRACTIONS[name], point(40, 5)
        v = tangent_projection(z, normal(40, 5))
        v = v / v.norm()
        assert (retract(z, torch.zeros_like(v)) - z).abs().max() < 1e-13
        errors = [float((retract(z, t * v) - z - t * v).norm()) for t in (0.02, 0.01, 0.005)]
        assert 3.5 < errors[0] / errors[1] < 4.5
        assert 3.5 < errors[1] / errors[2] < 4.5

    @pytest.mark.parametrize("name", RETRACTIONS)
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
    def test_they_stay_on_the_manifold(self, name, dtype, bound):
        z = uniform_point(2, 4096, 64, dtype=dtype)
        v = tangent_projection(z, torch.randn(2, 4096, 64, dtype=dtype))
        v = 0.5 * v / v.norm(dim=(-2, -1), keepdim=True)
        assert orthogonality_error(RETRACTIONS[name](z, v)).max() < bound

    def test_the_default_stays_within_the_promise_of_a_training_run_in_float32(self):
        z = uniform_point(4096, 32)
        for _ in range(50):
            z = retract_polar(z, tangent_projection(z, 1e-2 * torch.randn(4096, 32)))
        assert orthogonality_error(z) < 1e-5

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
    def test_polar_by_the_gram_matrix_is_polar_by_svd(self, dtype, bound):
        matrix = torch.randn(3, 200, 16, dtype=dtype)
        assert (project(matrix) - polar_by_svd(matrix)).abs().max() < bound
        assert (project(project(matrix)) - project(matrix)).abs().max() < (1e-13 if dtype == torch.float64 else 1e-6)

    def test_an_ill_conditioned_matrix_is_projected_all_the_same(self):
        left, right = point(60, 6), point(6, 6)
        matrix = left @ torch.diag(torch.logspace(0, -4, 6, dtype=torch.float64)) @ right.mT
        assert orthogonality_error(project(matrix)) < 1e-12
        assert (project(matrix) - left @ right.mT).abs().max() < 1e-9

    def test_polar_is_equivariant_to_rotations_of_the_columns(self):
        z, q = point(40, 5), point(5, 5)
        v = tangent_projection(z, normal(40, 5))
        assert (retract_polar(z @ q, v @ q) - retract_polar(z, v) @ q).abs().max() < 1e-12

    def test_the_triangular_factor_of_qr_has_a_positive_diagonal(self):
        z = point(40, 5)
        v = tangent_projection(z, 3 * normal(40, 5))
        factor = retract_qr(z, v).mT @ (z + v)
        assert (factor.diagonal() > 0).all()
        assert factor.tril(-1).abs().max() < 1e-12

    def test_square_matrices_are_fine(self):
        z = point(6, 6)
        v = tangent_projection(z, normal(6, 6))
        for name in ("polar", "cholesky_qr", "qr", "cayley"):
            assert orthogonality_error(RETRACTIONS[name](z, v)) < 1e-12


class TestTangentSpace:
    def test_the_projection_is_idempotent_self_adjoint_and_tangent(self):
        z, a, b = point(40, 5), normal(40, 5), normal(40, 5)
        projected = tangent_projection(z, a)
        assert (tangent_projection(z, projected) - projected).abs().max() < 1e-14
        assert abs((projected * b).sum() - (a * tangent_projection(z, b)).sum()) < 1e-12
        assert (z.mT @ projected + projected.mT @ z).abs().max() < 1e-14

    def test_the_canonical_gradient_is_no_projection(self):
        z, g = point(40, 5), normal(40, 5)
        once = canonical_gradient(z, g)
        assert (z.mT @ once + once.mT @ z).abs().max() < 1e-13
        assert (canonical_gradient(z, once) - once).norm() > 0.05 * once.norm()


class TestUniform:
    def test_draws_are_on_the_manifold_seeded_and_isotropic(self):
        prior = UniformStiefel(3, 20, 4, dtype=torch.float64)
        draws = prior.sample((4000,))
        assert draws.shape == (4000, 3, 20, 4)
        assert bool(stiefel.check(draws).all())
        # E[z^2] = 1/rows; its relative standard error here is sqrt(2 / (4000 * 3 * 4)) < 0.7 %: six of them
        assert draws.square().mean((0, 1, 3)).sub(1 / 20).abs().max() < 0.04 / 20
        again = [uniform_point(5, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*again)

    def test_its_density_is_one(self):
        prior = UniformStiefel(5, 3, 1)
        assert prior.log_prob(prior.sample((4,))).tolist() == [0.0] * 4

    def test_more_columns_than_rows_are_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 3\) holds no matrices with orthonormal columns"):
            UniformStiefel(2, 3)


def test_stable_rank_of_the_core_is_that_of_the_change():
    x, y, theta = point(40, 5), point(30, 5), normal(5, 5)
    assert stable_rank(theta) == pytest.approx(float(stable_rank(x @ theta @ y.mT)), abs=1e-10)
    assert stable_rank(torch.zeros(3, 3)) == 0.0
