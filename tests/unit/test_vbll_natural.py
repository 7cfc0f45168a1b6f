"""The optimum of a last layer's posterior: conjugate algebra, stationarity, order of bounds, regression, generative head."""

import math
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BlockCovariance, ClassContrasts, FullCovariance, LowRankPrecision, MatrixNormal, MeanField
from pyrolora.guides.vbll import LogitMoments, logit_moments
from pyrolora.inference.last_layer import HeadData
from pyrolora.inference.vbll.contrasts import ContrastRows
from pyrolora.inference.vbll.generative import Generative
from pyrolora.inference.vbll.heteroscedastic import HeteroscedasticObjective, HeteroscedasticRegression
from pyrolora.inference.vbll.natural import ClassRows, GaussianRows, Whitened, optimum, standard_divergence
from pyrolora.inference.vbll.objectives import Objective, optimal_tilt, tilted_at
from pyrolora.inference.vbll.refit import place
from pyrolora.inference.vbll.regression import GaussianObjective, Regression
from pyrolora.inference.vbll.student import StudentRegression
from pyrolora.models.sites import Site

PRIOR_SCALE = 2.0


def complete(moments, offset):
    return LogitMoments(moments.mean + offset, moments.spread)


def softmax_data(examples=60, weights=5, classes=3):
    inputs = torch.randn(examples, weights, dtype=torch.float64)
    truth = torch.randn(classes, weights, dtype=torch.float64)
    labels = torch.multinomial((inputs @ truth.mT).softmax(-1), 1)[:, 0]
    return HeadData(inputs, torch.zeros(examples, classes, dtype=torch.float64), labels)


def whitened(data, rows, scale=PRIOR_SCALE):
    zero = torch.zeros(rows, data.inputs.shape[1], dtype=torch.float64)
    return Whitened.of(data, zero, torch.full_like(zero, scale))


def moments_of(white, rows):
    solved = torch.linalg.solve_triangular(
        rows.roots(white.inputs), white.inputs.mT.expand(len(rows.mean), -1, -1), upper=False
    )
    return LogitMoments(white.inputs @ rows.mean.mT, solved.square().sum(-2).mT)


def true_elbo(data, white, rows, draws=40_000):
    """ELBO with the likelihood's expectation by antithetic sampling; its standard error is below 0.05 here."""
    moments = moments_of(white, rows)
    noise = torch.randn(draws, *moments.mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    away = moments.variance.sqrt() * noise
    pairs = 0.5 * ((moments.mean + away).log_softmax(-1) + (moments.mean - away).log_softmax(-1))
    likelihood = pairs.mean(0).gather(-1, data.labels[:, None]).sum()
    return float(likelihood - standard_divergence(rows.mean, rows.roots(white.inputs)))


class TestConjugate:
    """Gaussian likelihood: the posterior and the evidence are known."""

    def problem(self, examples, weights, outputs=1):
        inputs = torch.randn(examples, weights, dtype=torch.float64)
        targets = inputs @ torch.randn(weights, outputs, dtype=torch.float64)
        targets = targets + 0.3 * torch.randn(examples, outputs, dtype=torch.float64)
        return HeadData(inputs, torch.zeros(examples, outputs, dtype=torch.float64), targets)

    @pytest.mark.parametrize(("examples", "weights"), [(40, 6), (20, 120)])
    def test_the_elbo_of_the_optimum_is_the_log_evidence_after_one_step(self, examples, weights):
        data, noise = self.problem(examples, weights), torch.tensor([0.3], dtype=torch.float64)
        white = whitened(data, 1)
        _, loss = optimum(data, white, complete, GaussianObjective(noise), steps=1, polish_steps=0)
        covariance = PRIOR_SCALE**2 * data.inputs @ data.inputs.mT + 0.09 * torch.eye(examples, dtype=torch.float64)
        evidence = torch.distributions.MultivariateNormal(
            torch.zeros(examples, dtype=torch.float64), covariance
        ).log_prob(data.labels[:, 0])
        assert abs(-loss - float(evidence)) < 1e-9

    def test_any_other_posterior_has_a_smaller_elbo(self):
        data, noise = self.problem(30, 5), torch.tensor([0.3], dtype=torch.float64)
        white, objective = whitened(data, 1), GaussianObjective(noise)
        best, loss = optimum(data, white, complete, objective)
        for _ in range(20):
            other = GaussianRows(
                best.mean + 0.1 * torch.randn_like(best.mean), best.curvature * (0.5 + torch.rand_like(best.curvature))
            )
            elbo = objective(moments_of(white, other), data.labels).sum() - standard_divergence(
                other.mean, other.roots(white.inputs)
            )
            assert float(elbo) < -loss

    def test_a_low_rank_precision_of_the_rank_of_the_data_is_exact_and_a_smaller_one_is_not(self):
        data, noise = self.problem(20, 120), torch.tensor([0.3], dtype=torch.float64)
        white = whitened(data, 1)
        rows, _ = optimum(data, white, complete, GaussianObjective(noise))
        exact = torch.linalg.inv(
            data.inputs.mT @ data.inputs / 0.09 + torch.eye(120, dtype=torch.float64) / PRIOR_SCALE**2
        )
        site = Site("head.weight", torch.Size((1, 120)), ("class", "feature"))
        prior = dist.Normal(torch.zeros((), dtype=torch.float64), PRIOR_SCALE).expand(site.shape).to_event(2)
        start, queries = torch.zeros(site.shape, dtype=torch.float64), torch.randn(50, 120, dtype=torch.float64)
        expected = (queries @ exact * queries).sum(-1)
        for family, fits in ((LowRankPrecision(20), True), (BlockCovariance(), True), (LowRankPrecision(10), False)):
            factor = family.factor(site, start, prior)
            assert place(factor, white, rows) == fits
            q = factor.distribution()
            found = q.quadratic(queries)[:, 0] if "Low" in type(q).__name__ else None
            found = (queries @ q.scale_tril[0]).square().sum(-1) if found is None else found
            assert ((found / expected - 1).abs().max() < 1e-8) == fits

    def test_regression_equals_its_closed_form_and_counts_every_output_once(self):
        """K = 3: the package vbll averages over outputs and multiplies by the summed precision there."""
        data = self.problem(25, 4, outputs=3)
        posterior = Regression(prior_scale=PRIOR_SCALE, noise=0.3).fit(data.inputs, data.labels)
        covariance = PRIOR_SCALE**2 * data.inputs @ data.inputs.mT + 0.09 * torch.eye(25, dtype=torch.float64)
        each = torch.distributions.MultivariateNormal(torch.zeros(25, dtype=torch.float64), covariance)
        assert posterior.elbo == pytest.approx(float(each.log_prob(data.labels.mT).sum()), abs=1e-9)
        queries = torch.randn(6, 4, dtype=torch.float64)
        precision = data.inputs.mT @ data.inputs / 0.09 + torch.eye(4, dtype=torch.float64) / PRIOR_SCALE**2
        mean, variance = posterior.predict(queries)
        expected = torch.linalg.solve(precision, data.inputs.mT @ data.labels / 0.09)
        assert (mean - queries @ expected).abs().max() < 1e-9
        spread = (queries @ torch.linalg.inv(precision) * queries).sum(-1, keepdim=True) + 0.09
        assert (variance - spread).abs().max() < 1e-9

    def test_the_learned_noise_maximises_the_evidence(self):
        data = self.problem(40, 5)
        learned = Regression(prior_scale=PRIOR_SCALE).fit(data.inputs, data.labels)
        noise = float(learned.noise)
        others = [Regression(PRIOR_SCALE, factor * noise).fit(data.inputs, data.labels).elbo for factor in (0.9, 1.1)]
        assert learned.elbo > max(others)
        assert noise == pytest.approx(0.3, rel=0.5)


class TestStudent:
    """Noise unknown: conjugate, so scipy's multivariate t is the oracle of the evidence."""

    @pytest.mark.parametrize(("examples", "weights"), [(12, 4), (6, 20)])
    def test_evidence_and_predictions_are_those_of_the_joint_student_distribution(self, examples, weights):
        from scipy.stats import multivariate_t

        inputs = torch.randn(examples + 1, weights, dtype=torch.float64)
        targets = torch.randn(examples + 1, 2, dtype=torch.float64)
        posterior = StudentRegression(prior_scale=0.7, shape=1.5, rate=0.4).fit(inputs[:-1], targets[:-1])

        def joint(rows):
            covariance = torch.eye(len(rows)).double() + 0.7**2 * rows @ rows.mT
            return multivariate_t(shape=(0.4 / 1.5 * covariance).numpy(), df=3.0)

        before = joint(inputs[:-1]).logpdf(targets[:-1].mT.numpy()).sum()
        assert posterior.log_evidence == pytest.approx(before, abs=1e-9)
        after = joint(inputs).logpdf(targets.mT.numpy()).sum()
        assert float(posterior.predict(inputs[-1:]).log_prob(targets[-1:]).sum()) == pytest.approx(
            after - before, abs=1e-9
        )

    def test_what_it_refuses(self):
        with pytest.raises(ValueError, match=r"rate must be positive; got 0"):
            StudentRegression(rate=0)
        with pytest.raises(ValueError, match=r"do not fit 3 rows of features; expected \(3, outputs\)"):
            StudentRegression().fit(torch.zeros(3, 2), torch.zeros(3))


class TestHeteroscedastic:
    def problem(self, examples=400):
        inputs = torch.cat([torch.randn(examples, 2), torch.ones(examples, 1)], dim=1).double()
        log_noise = -2 + inputs @ torch.tensor([1.0, 0.0, 0.0]).double()
        mean = inputs @ torch.tensor([0.5, -1.0, 2.0]).double()
        targets = mean + (0.5 * log_noise).exp() * torch.randn(examples, dtype=torch.float64)
        return inputs, targets[:, None]

    def test_it_finds_the_noise_that_made_the_data(self):
        torch.manual_seed(0)
        inputs, targets = self.problem()
        posterior = HeteroscedasticRegression(prior_scale=2.0, noise_scale=1.0).fit(inputs, targets)
        mean, variance = posterior.predict(inputs)
        # an estimate from 400 squares: standard error of the slope 0.07
        slope = torch.linalg.lstsq(inputs, variance.log()).solution[:2, 0]
        assert (slope - torch.tensor([1.0, 0.0]).double()).abs().max() < 0.35
        assert (mean[:, 0] - inputs @ torch.tensor([0.5, -1.0, 2.0]).double()).abs().mean() < 0.1
        constant = Regression(prior_scale=2.0).fit(inputs, targets)
        assert posterior.elbo > constant.elbo + 20

    def test_the_objective_is_the_expectation_and_the_optimum_is_stationary(self):
        torch.manual_seed(1)
        objective = HeteroscedasticObjective(torch.tensor([-0.3]).double(), 0.5)
        moments = LogitMoments(torch.tensor([[0.4, 0.8]]).double(), torch.tensor([[0.3, 0.6]]).double())
        draws = moments.mean + moments.variance.sqrt() * torch.randn(400_000, 2, dtype=torch.float64)
        normal = torch.distributions.Normal(draws[:, 0], (0.5 * (-0.3 + 0.5 * draws[:, 1])).exp())
        values = normal.log_prob(torch.tensor(1.1).double())
        found = float(objective(moments, torch.tensor([[1.1]]).double()))
        assert abs(found - values.mean()) < 5 * values.std() / len(values) ** 0.5
        inputs, targets = self.problem(60)
        posterior = HeteroscedasticRegression().fit(inputs, targets)
        rows, white = posterior.rows, posterior.white
        for sign in (1, -1):
            for nudge in (1e-2 * torch.randn_like(rows.mean), None):
                other = GaussianRows(rows.mean + sign * nudge, rows.curvature) if nudge is not None else GaussianRows(
                    rows.mean, rows.curvature * (1 + sign * 0.05 * torch.rand_like(rows.curvature)))  # fmt: skip
                bound = posterior.objective(LogitMoments(*white.moments(other, inputs)), targets).sum()
                assert float(bound - other.divergence(other.roots(white.inputs))) < posterior.elbo + 1e-6

    def test_predictions_are_the_integral_over_the_noise(self):
        torch.manual_seed(2)
        inputs, targets = self.problem(30)
        posterior = HeteroscedasticRegression(prior_scale=1.0, noise_scale=1.0).fit(inputs, targets)
        grid = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
        density = posterior.log_prob(inputs[:1].expand(len(grid), -1), grid[:, None]).exp()[:, 0]
        mean, variance = posterior.predict(inputs[:1])
        step = float(grid[1] - grid[0])
        assert float(density.sum()) * step == pytest.approx(1.0, abs=1e-6)
        assert float((density * grid).sum()) * step == pytest.approx(float(mean), abs=1e-4)
        second = float((density * (grid - float(mean)).square()).sum()) * step
        assert second == pytest.approx(float(variance), rel=1e-3)
        with pytest.raises(ValueError, match=r"noise_scale must be positive; got -1"):
            HeteroscedasticRegression(noise_scale=-1)


class TestSoftmax:
    @pytest.mark.parametrize("name", ["jensen", "tilted"])
    @pytest.mark.parametrize(("examples", "weights"), [(60, 5), (30, 50)])
    def test_the_optimum_is_stationary(self, name, examples, weights):
        data = softmax_data(examples, weights)
        white = whitened(data, 3)
        rows, _ = optimum(data, white, complete, Objective(name), tolerance=1e-14)
        mean, variance = moments_of(white, rows)
        if name == "jensen":
            pull = (mean + 0.5 * variance).softmax(-1)
            weight = pull
        else:
            pull = optimal_tilt(LogitMoments(mean, variance))
            weight = pull * (1 - pull)
        known = torch.nn.functional.one_hot(data.labels, 3).double()
        # precision and mean of the closed-form stationary conditions
        precision, expected = (white.inputs.mT @ (one.mT[..., None] * white.inputs) for one in (rows.curvature, weight))
        assert ((precision - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max() < 1e-4
        assert (rows.mean - (known - pull).mT @ white.inputs).abs().max() < 1e-4

    @pytest.mark.parametrize("kind", [GaussianRows, ClassRows])
    @pytest.mark.parametrize("name", ["jensen", "tilted", "bohning", "bouchard", "mc"])
    def test_a_step_never_raises_the_loss(self, name, kind):
        data = softmax_data()
        white, losses = whitened(data, 3), []
        common = {"tolerance": 0.0, "polish_steps": 0, "start": kind.at_prior(white)}
        for steps in range(1, 12):
            losses.append(optimum(data, white, complete, Objective(name), steps=steps, **common)[1])
        assert all(after <= before + 1e-10 for before, after in pairwise(losses))
        assert losses[-1] < losses[0] - 0.1

    @pytest.mark.parametrize("name", ["jensen", "tilted", "bouchard", "mc"])
    def test_rows_of_classes_are_nearer_to_the_same_optimum_after_equal_steps(self, name):
        data = softmax_data(40, 60, classes=5)
        white = whitened(data, 5, scale=0.5)
        converged, best = optimum(data, white, complete, Objective(name), tolerance=1e-13, polish_steps=3000)
        found = {}
        for kind in (GaussianRows, ClassRows):
            start = kind.at_prior(white)
            rows, loss = optimum(
                data, white, complete, Objective(name), steps=30, tolerance=0, polish_steps=0, start=start
            )
            assert type(rows) is kind
            found[kind] = loss - best, float(rows.mean.sum(0).abs().max())
        # what is left of the loss above the optimum; its own rounding is below 1e-9
        assert found[ClassRows][0] < 0.1 * found[GaussianRows][0] + 1e-9
        assert found[ClassRows][1] < 1e-12 < 1e-8 < found[GaussianRows][1]
        assert converged.mean.sum(0).abs().max() < 1e-4

    def test_order_of_bounds_and_of_what_they_find(self):
        data = softmax_data()
        white = whitened(data, 3)
        found = {name: optimum(data, white, complete, Objective(name, 256)) for name in ("jensen", "tilted", "mc")}
        elbo = {name: true_elbo(data, white, rows) for name, (rows, _) in found.items()}
        assert -found["jensen"][1] <= elbo["jensen"] + 0.05
        assert -found["tilted"][1] <= elbo["tilted"] + 0.05
        assert elbo["jensen"] < elbo["mc"] - 1.0
        assert abs(elbo["tilted"] - elbo["mc"]) < 0.5

    def test_a_sample_that_stands_for_more_counts_as_often(self):
        data = softmax_data(20)
        twice = HeadData(data.inputs.repeat(2, 1), data.offset.repeat(2, 1), data.labels.repeat(2))
        weighted = HeadData(data.inputs, data.offset, data.labels, weight=2.0)
        losses = [optimum(one, whitened(one, 3), complete, Objective("tilted"))[1] for one in (twice, weighted)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-7)

    def test_disjoint_batches_average_to_the_whole(self):
        data = softmax_data()
        moments = moments_of(whitened(data, 3), GaussianRows(torch.zeros(3, 5).double(), torch.ones(60, 3).double()))
        whole = Objective("tilted")(moments, data.labels).mean()
        for size in (1, 5, 12, 30):
            parts = [
                Objective("tilted")(
                    LogitMoments(moments.mean[i : i + size], moments.spread[i : i + size]), labels
                ).mean()
                for i, labels in zip(range(0, 60, size), data.labels.split(size), strict=True)
            ]
            assert abs(torch.stack(parts).mean() - whole) < 1e-12

    def test_jensen_gains_nothing_from_correlated_classes(self):
        """It sees variances alone: the joint optimum is the factorised one."""
        data = softmax_data(30, 4)
        white = whitened(data, 3)
        _, loss = optimum(data, white, complete, Objective("jensen"), tolerance=1e-13)
        site = Site("head.weight", torch.Size((3, 4)), ("class", "feature"))
        prior = dist.Normal(torch.zeros((), dtype=torch.float64), PRIOR_SCALE).expand(site.shape).to_event(2)
        losses = {}
        for name in ("jensen", "tilted"):
            for family in (FullCovariance(), BlockCovariance(), MatrixNormal(), MeanField()):
                losses[name, type(family).__name__] = minimise(family, site, prior, data, Objective(name))
        assert losses["jensen", "FullCovariance"] == pytest.approx(loss, abs=1e-3)
        assert losses["jensen", "BlockCovariance"] == pytest.approx(loss, abs=1e-3)
        assert losses["tilted", "FullCovariance"] < losses["tilted", "BlockCovariance"] - 0.5
        assert losses["tilted", "MeanField"] > losses["tilted", "BlockCovariance"] + 0.1
        assert losses["tilted", "BlockCovariance"] < losses["jensen", "BlockCovariance"] - 1.0

    def test_a_prior_of_several_widths_or_none_is_refused(self):
        data = softmax_data()
        zero = torch.zeros(3, 5, dtype=torch.float64)
        with pytest.raises(ValueError, match="has several standard deviations"):
            Whitened.of(data, zero, 1 + torch.rand(3, 5, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"The prior scale of head\.weight must be positive; got 0"):
            Whitened.of(data, zero, zero)


def minimise(family, site, prior, data, objective):
    from torch.distributions import kl_divergence

    from pyrolora.guides import logit_moments

    factor = family.factor(site, torch.zeros(site.shape, dtype=torch.float64), prior)
    optimiser = torch.optim.LBFGS(factor.parameters(), max_iter=1000, line_search_fn="strong_wolfe", history_size=50)
    last = math.inf

    def closure():
        nonlocal last
        optimiser.zero_grad()
        q = factor.distribution()
        moments = complete(logit_moments(q, data.inputs), data.offset)
        loss = kl_divergence(q, prior) - objective(moments, data.labels).sum()
        loss.backward()
        last = loss.item()
        return loss

    optimiser.step(closure)
    return last


class TestGenerative:
    def data(self):
        labels = torch.arange(90) % 3
        means = 2 * torch.randn(3, 6, dtype=torch.float64)
        return means[labels] + torch.randn(90, 6, dtype=torch.float64), labels

    def test_it_classifies_and_tells_what_is_unlike_any_class(self):
        features, labels = self.data()
        posterior = Generative().fit(features, labels)
        probs = posterior.predict(features)
        assert (probs.argmax(-1) == labels).float().mean() > 0.95
        assert (probs.sum(-1) - 1).abs().max() < 1e-12
        foreign = features + 12.0
        assert posterior.log_marginal(foreign).max() < posterior.log_marginal(features).min()

    def test_densities_are_those_of_torch_and_the_bound_is_below_the_likelihood(self):
        features, labels = self.data()
        posterior = Generative().fit(features, labels)
        spread = torch.diag_embed(posterior.noise + posterior.variance)
        expected = torch.distributions.MultivariateNormal(posterior.mean, spread).log_prob(features[:, None])
        assert (posterior.log_density(features) - expected).abs().max() < 1e-9
        joint = expected + posterior.log_prior
        likelihood = (joint.gather(-1, labels[:, None])[:, 0] - joint.logsumexp(-1)).sum()
        assert posterior.bound < likelihood

    def test_what_it_refuses(self):
        features, labels = self.data()
        with pytest.raises(ValueError, match="No training example has the class 1"):
            Generative().fit(features[labels != 1], labels[labels != 1])
        features[4, 0] = math.nan
        with pytest.raises(ValueError, match="features of row 4 are not finite"):
            Generative().fit(features, labels)
        with pytest.raises(ValueError, match="prior_scale must be positive; got 0"):
            Generative(prior_scale=0.0)
        with pytest.raises(ValueError, match="noise must be positive"):
            Regression(noise=-1.0)
        with pytest.raises(ValueError, match=r"expected \(90, outputs\)"):
            Regression().fit(features, labels.double())


class TestContrasts:
    """Rows that are independent but for a shift of all of them."""

    def fitted(self, data, name, classes=3, steps=400, tolerance=1e-13):
        white = whitened(data, classes)
        return white, *optimum(
            data, white, complete, Objective(name), steps=steps, tolerance=tolerance, start=ContrastRows.at_prior(white)
        )

    def test_two_classes_have_the_optimum_of_one_logistic_vector(self):
        """Its prior variance is that of a difference of two rows, and any Normal posterior of it can be had."""
        data = softmax_data(40, 4, classes=2)
        white, rows, loss = self.fitted(data, "gauss_hermite", classes=2)
        one = whitened(data, 1, 2**0.5 * PRIOR_SCALE)

        def identified(moments, offset):
            pad = torch.nn.functional.pad
            return LogitMoments(pad(moments.mean, (1, 0)), pad(moments.spread, (1, 0)))

        single, expected = optimum(data, one, identified, Objective("gauss_hermite"), tolerance=1e-13, steps=400)
        assert loss == pytest.approx(expected, abs=1e-7)
        found, wanted = moments_of(white, rows), moments_of(one, single)
        assert (found.mean[:, 1] - found.mean[:, 0] - wanted.mean[:, 0]).abs().max() < 1e-4
        assert (found.variance.sum(-1) / wanted.variance[:, 0] - 1).abs().max() < 1e-4

    def test_the_loss_never_rises_and_ends_below_that_of_independent_rows(self):
        data = softmax_data()
        losses = [
            optimum(data, w := whitened(data, 3), complete, Objective("tilted"), steps=n, tolerance=0.0,
                    start=ContrastRows.at_prior(w))[1]
            for n in (1, 3, 10, 30)
        ]  # fmt: skip
        assert all(later <= earlier for earlier, later in pairwise(losses))
        _, independent = optimum(data, whitened(data, 3), complete, Objective("tilted"))
        assert losses[-1] < independent - 1

    def test_the_optimum_is_stationary(self):
        data = softmax_data(30, 6)
        white, rows, loss = self.fitted(data, "tilted")
        for _ in range(10):
            nudge = 1e-3 * torch.randn_like(rows.precision)
            for sign in (1, -1):
                other = ContrastRows(rows.mean, rows.precision + sign * (nudge + nudge.mT))
                moments = moments_of(white, other)
                bound = Objective("tilted")(moments, data.labels).sum()
                assert float(other.divergence(other.roots(white.inputs)) - bound) > loss - 1e-9

    @pytest.mark.parametrize(("examples", "weights"), [(30, 5), (12, 20)])
    def test_the_factor_holds_it_exactly(self, examples, weights):
        """Its ELBO as a distribution over the weights, with the KL of the general mechanism, is the loss that was found."""
        data = softmax_data(examples, weights)
        white, rows, loss = self.fitted(data, "tilted", steps=15)
        site = Site("head.weight", torch.Size((3, weights)), ("class", "feature"))
        prior = dist.Normal(torch.zeros((), dtype=torch.float64), PRIOR_SCALE).expand(site.shape).to_event(2)
        factor = ClassContrasts().factor(site, torch.zeros(site.shape, dtype=torch.float64), prior)
        assert place(factor, white, rows)
        with torch.no_grad():
            q = factor.distribution()
            moments = logit_moments(q, data.inputs)
            # the shift's variance slows the search for the tilt down
            tilt = optimal_tilt(moments, steps=5000)
            bound = moments.mean.gather(1, data.labels[:, None])[:, 0] - tilted_at(moments, tilt)
            negative_elbo = float(torch.distributions.kl_divergence(q, prior) - bound.sum())
        assert negative_elbo == pytest.approx(loss, abs=1e-4)

    def test_one_row_has_no_contrasts(self):
        site = Site("head.weight", torch.Size((1, 4)), ("class", "feature"))
        with pytest.raises(ValueError, match=r"needs two rows at least; 'head\.weight' has 1\. Use BlockCovariance"):
            ClassContrasts().factor(site, torch.zeros(site.shape), dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
