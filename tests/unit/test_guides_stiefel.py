"""The Normal on the Stiefel manifold: its density against quadrature, Monte Carlo and explicit Jacobians, in float64."""

import math

import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyrolora.guides import MeanField, Point, StiefelNormal, build_guide
from pyrolora.guides.stiefel import StiefelNormalDistribution, log_volume
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import PoLAR
from pyrolora.models.stiefel import orthogonality_error, uniform_point
from pyrolora.models.uniform_stiefel import UniformStiefel, stiefel


def posterior_at(rows, rank, scale, seed=0):
    source = torch.Generator().manual_seed(seed)
    loc = uniform_point(rows, rank, dtype=torch.float64, generator=source)
    widths = scale * (0.5 + torch.rand(1, rank, dtype=torch.float64, generator=source))
    return StiefelNormalDistribution(loc, widths)


def complement(point):
    """Columns that complete a point to an orthogonal matrix."""
    return torch.linalg.qr(point, mode="complete").Q[:, point.shape[1] :]


class TestDensity:
    def test_on_the_circle_it_is_a_normal_in_the_tangent_of_the_angle(self):
        """Quadrature over the angle: the density, its integral, and the KL to the uniform distribution."""
        q = StiefelNormalDistribution(
            torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.full((1, 1), 0.6, dtype=torch.float64)
        )
        angle = torch.linspace(-math.pi, math.pi, 200_001, dtype=torch.float64)[:-1]
        points = torch.stack([angle.cos(), angle.sin()], dim=-1)[..., None]
        found = q.log_prob(points)
        inside = angle.cos() > 1e-2
        tangent = torch.distributions.Normal(torch.zeros(()).double(), 0.6).log_prob(angle.tan())
        expected = tangent - 2 * angle.cos().abs().log() + math.log(2 * math.pi)
        assert (found - expected)[inside].abs().max() < 1e-8
        assert found[angle.cos() < -1e-6].isneginf().all()
        assert abs(found.exp().mean() - 1) < 1e-8
        divergence = (found.exp() * found.clamp_min(-1e9)).mean()
        draws = q.rsample((200_000,))
        values = q.log_prob(draws)
        # five standard errors: 1 run in 10^6
        assert abs(values.mean() - divergence) < 5 * values.std() / len(draws) ** 0.5

    @pytest.mark.parametrize(("rows", "rank"), [(3, 1), (3, 2), (2, 2), (4, 3), (3, 3)])
    def test_it_integrates_to_one_over_the_manifold(self, rows, rank):
        """Importance-free: the mean of the density over uniform draws. Seven standard errors of heavy-tailed weights."""
        q = posterior_at(rows, rank, 0.7)
        draws = uniform_point(60_000, rows, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weights = q.log_prob(draws).exp()
        error = float(weights.std()) / len(weights) ** 0.5
        # a square matrix may also have determinant -1, where the density is zero; Z0' Z then has an eigenvalue -1
        assert abs(float(weights.mean()) - 1) < 7 * error
        assert error < 0.05

    @pytest.mark.parametrize(("rows", "rank"), [(5, 3), (6, 4), (4, 4), (7, 1)])
    def test_the_jacobian_is_that_of_the_explicit_map(self, rows, rank):
        """All rows * rank - rank (rank + 1) / 2 coordinates, by central differences."""
        q = posterior_at(rows, rank, 0.4)
        z0, other = q.loc, complement(q.loc)
        low = torch.tril_indices(rank, rank, -1)
        count = low.shape[1]

        def tangent(coordinates):
            skew = torch.zeros(rank, rank, dtype=torch.float64).index_put((low[0], low[1]), coordinates[:count])
            return z0 @ (skew - skew.mT) + other @ coordinates[count:].reshape(rows - rank, rank)

        def point(coordinates):
            v = tangent(coordinates)
            values, vectors = torch.linalg.eigh(torch.eye(rank).double() + v.mT @ v)
            return (z0 + v) @ (vectors * values.rsqrt()) @ vectors.mT

        at = 0.4 * torch.randn(rows * rank - rank * (rank + 1) // 2, dtype=torch.float64)
        z = point(at)
        steps = 1e-5 * torch.eye(len(at), dtype=torch.float64)
        moved = torch.stack([(point(at + step) - point(at - step)) / 2e-5 for step in steps], dim=-1)
        frame = torch.cat([(z.mT @ moved.reshape(rows, -1)).reshape(rank, rank, -1)[low[0], low[1]],
                           torch.einsum("nb,nrp->brp", complement(z), moved).flatten(0, 1)])  # fmt: skip
        variances = 0.25 * (q.scale.square() + q.scale.square().mT)[low[0], low[1]]
        widths = torch.cat([variances.sqrt(), q.scale.expand(rows - rank, rank).flatten()])
        expected = torch.distributions.Normal(0.0, widths).log_prob(at).sum() - torch.linalg.slogdet(frame).logabsdet
        assert abs(q.log_prob(z) - expected - log_volume(rows, rank)) < 1e-7

    def test_volumes_of_spheres_and_rotations(self):
        assert log_volume(2, 1) == pytest.approx(math.log(2 * math.pi))
        assert log_volume(3, 1) == pytest.approx(math.log(4 * math.pi))
        # two of the rotation group's, which is half a unit 3-sphere of radius 2
        assert log_volume(3, 3) == pytest.approx(math.log(2 * 8 * math.pi**2))

    def test_a_stack_is_one_event_whose_matrices_are_independent(self):
        single = [posterior_at(6, 2, 0.3, seed) for seed in range(3)]
        q = StiefelNormalDistribution(torch.stack([s.loc for s in single]), torch.stack([s.scale for s in single]))
        draws = q.rsample((4,))
        assert draws.shape == (4, 3, 6, 2)
        expected = sum(s.log_prob(draws[:, i]) for i, s in enumerate(single))
        assert (q.log_prob(draws) - expected).abs().max() < 1e-9
        assert q.log_prob(draws[0]).shape == ()

    def test_float32_agrees_with_float64_at_the_size_of_a_model(self):
        q = posterior_at(576, 8, 0.1 / 24)
        small = StiefelNormalDistribution(q.loc.float(), q.scale.float())
        torch.manual_seed(0)
        draw = small.rsample((3,))
        assert orthogonality_error(draw).max() < 1e-5
        reference = StiefelNormalDistribution(small.loc.double(), small.scale.double())
        assert (small.log_prob(draw) - reference.log_prob(draw.double())).abs().max() < 0.05
        # of 4572 dimensions: their Normal entropy to leading order
        assert small.log_prob(draw).mean() > 1000


class TestDraws:
    def test_they_are_orthonormal_and_have_the_moments_that_are_claimed(self):
        q = posterior_at(8, 3, 0.05)
        draws = q.rsample((100_000,))
        assert orthogonality_error(draws).max() < 1e-12
        expected = q.variance + (draws.mean(0)).square()
        assert ((draws.square().mean(0) - expected) / 0.05**2).abs().max() < 0.1
        assert (q.variance.sum(-2) > 0).all()

    @pytest.mark.parametrize(("rows", "rank"), [(3, 2), (4, 2)])
    def test_draws_and_density_are_of_one_distribution(self, rows, rank):
        """Means of two functions over draws, and over uniform draws weighted by the density."""
        q = posterior_at(rows, rank, 0.4)
        draws = q.rsample((60_000,))
        uniform = uniform_point(60_000, rows, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        weights = q.log_prob(uniform).exp()
        for function in (lambda z: (q.loc.mT @ z)[:, 1, 0].square(), lambda z: (q.loc.mT @ z)[:, 0, 0]):
            direct, weighted = function(draws), function(uniform) * weights
            error = ((direct.var() + weighted.var()) / len(draws)).sqrt()
            # five standard errors: 1 run in 10^6
            assert abs(direct.mean() - weighted.mean()) < 5 * error

    def test_gradients_are_those_of_finite_differences_even_where_eigenvalues_coincide(self):
        loc = uniform_point(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        target = torch.randn(6, 3, dtype=torch.float64)

        def loss(scale):
            torch.manual_seed(3)
            q = StiefelNormalDistribution(loc, scale)
            z = q.rsample()
            return (z * target).sum() + 0.1 * q.log_prob(z)

        assert torch.autograd.gradcheck(loss, torch.full((1, 3), 0.2, dtype=torch.float64, requires_grad=True))
        still = torch.full((1, 3), 1e-9, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        StiefelNormalDistribution(loc, still).rsample().sum().backward()
        assert still.grad.isfinite().all()

    def test_a_rotation_of_everything_changes_no_density(self):
        q = posterior_at(6, 2, 0.3)
        z = q.rsample((3,))
        turn = uniform_point(6, 6, dtype=torch.float64)
        other = StiefelNormalDistribution(turn @ q.loc, q.scale)
        assert (q.log_prob(z) - other.log_prob(turn @ z)).abs().max() < 1e-10


class TestGuide:
    GUIDE = {"*.polar_X": StiefelNormal(), "*.polar_Y": StiefelNormal(0.02), "*theta": MeanField()}  # noqa: RUF012

    @pytest.fixture
    def model(self, three_topics_model):
        return three_topics_model(adapter=PoLAR(rank=2))

    @pytest.mark.parametrize("noise", ["example", "weight"])
    def test_it_is_trained_stays_on_the_manifold_and_is_saved(self, model, noise, tmp_path):
        posterior = SVI(guide=self.GUIDE, steps=3, noise=noise).fit(model, model.task.train, progress=False)
        assert all(entry["orthogonality_error"] < 1e-5 for entry in posterior.record["history"])
        assert all(math.isfinite(entry["kl"]) for entry in posterior.record["history"])
        draws = posterior.sample(3, generator=torch.Generator().manual_seed(0))
        for name, site in model.sites.items():
            if site.prior is not None:
                assert orthogonality_error(draws[name]).max() < 1e-5
                assert draws[name].std(0).max() > 1e-3
        assert posterior.log_prob(draws).isfinite().all()
        assert posterior.predict(model.task.train, draws=2).probs.shape[0] == 2
        loaded = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "fit"), model=model)
        again = loaded.sample(3, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(draws[name], again[name]) for name in draws)

    def test_the_width_shrinks_where_the_data_speak(self, model):
        """Under a cold posterior the data outweigh the prior, which wants wide ones."""
        widths = []
        for weight in (1e-4, 1.0):
            engine = SVI(guide=self.GUIDE, steps=25, kl_weight=weight, scale_learning_rate=0.1, learning_rate=1e-2)
            factors = dict(engine.fit(model, model.task.train, progress=False).guide.items())
            widths.append(
                float(torch.cat([f.log_scale.detach().flatten() for n, f in factors.items() if "_X" in n]).mean())
            )
        assert widths[0] < widths[1]

    def test_resting_layers_do_not_move(self, model):
        schedule = BlockSchedule(active=1, every=10)
        run = SVI(guide=self.GUIDE, steps=2, schedule=schedule).iterate(model, model.task.train)
        before = {name: value.clone() for name, value in run.guide.state_dict().items()}
        list(run)
        entries = run.optimiser.entries
        names = list(run.guide.site_names)
        for key, value in run.guide.state_dict().items():
            _, position, part = key.split(".")
            if part in ("loc", "log_scale"):
                active = entries[names[int(position)]]
                for layer in range(len(value)):
                    assert torch.equal(value[layer], before[key][layer]) == (layer not in active), key

    def test_the_uniform_prior_is_scored_at_its_draws(self, model):
        guide = build_guide(self.GUIDE, model)
        trace = poutine.trace(guide).get_trace(None)
        name = next(site.name for site in model.sites.values() if site.prior is not None)
        node = trace.nodes[name]
        assert isinstance(model.prior(model.sites[name]), UniformStiefel)
        assert node["fn"].log_prob(node["value"]) > 0

    def test_it_is_refused_elsewhere(self, model):
        with pytest.raises(
            ValueError, match=r"matrices with orthonormal columns, and '.*theta' lives on Real.*MeanField"
        ):
            build_guide(StiefelNormal(), model)
        with pytest.raises(ValueError, match="init_scale is a standard deviation"):
            StiefelNormal(-1.0)
        assert StiefelNormal.fits_manifold(stiefel)
        assert not StiefelNormal.fits_manifold(constraints.simplex)
        assert Point.fits_manifold(stiefel)
