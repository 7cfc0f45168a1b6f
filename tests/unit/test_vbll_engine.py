"""VBLL end to end on a tiny network: training modes, refits, post-training, one-pass prediction, refusals."""

import copy
import dataclasses

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyrolora.guides import BlockCovariance, ClassContrasts, FullCovariance, LowRankPrecision, MeanField, Point
from pyrolora.inference.evaluation.methods import METHODS
from pyrolora.inference.evaluation.ood import decompose
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.links import LOGIT_DRAWS
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.schedules import BlockSchedule
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.inference.vbll.likelihood import CollapsedProgram
from pyrolora.inference.vbll.natural_step import natural_step
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.inference.vbll.regression import GaussianObjective
from pyrolora.models.adapters import Adapter, FullRank, LastLayer, LoRA, PoLAR
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.backbones import Backbone
from pyrolora.models.declarations import declared_prior
from pyrolora.models.prior_declarations import learned, logit_scale
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Split

PRIOR = {"*.*_*": dist.Normal(0.0, 1.0), "head.weight": logit_scale(2.0)}


@pytest.fixture
def make(three_topics_model):
    def build(*adapters, dtype=torch.float32, prior=PRIOR, **layer):
        return three_topics_model(dtype, adapter=[*(adapters or (PoLAR(rank=2),)), LastLayer(**layer)], prior=prior)

    return build


def fit(model, **settings):
    return VBLL(**{"steps": 4, "learning_rate": 1e-2, **settings}).fit(model, model.task.train, progress=False)


def head_of(posterior):
    return dict(posterior.guide.items())["head.weight"]


class TestTraining:
    @pytest.mark.parametrize("mode", ["alternating", "joint"])
    @pytest.mark.parametrize("adapter", [PoLAR(rank=2), LoRA(rank=2)], ids=["PoLAR", "LoRA"])
    def test_it_learns_with_any_adapter(self, make, mode, adapter):
        model = make(adapter)
        posterior = fit(model, mode=mode, steps=25, warm_start=False)
        history = posterior.record["history"]
        assert history[-1]["loss"] < history[0]["loss"] - 0.05
        assert posterior.predict(model.task.train).mean_probs.sum(-1).allclose(torch.ones(12))

    def test_one_pass_of_the_network_a_step(self, make):
        model = make()
        run = VBLL(steps=3, head_steps=5, batch_size=12, warm_start=False).iterate(model, model.task.train)
        passes, original = [], model.backbone.features
        model.backbone.features = lambda batch, **kwargs: (passes.append(1), original(batch, **kwargs))[1]
        for _ in run:
            pass
        assert len(passes) == 3

    def test_head_steps_move_the_head_alone_and_the_other_step_the_rest_alone(self, make):
        model = make()
        engine = VBLL(steps=2, head_steps=3, warm_start=False, warmup=0.0, learning_rate=0.1)
        run, seen = engine.iterate(model, model.task.train), []
        step = run.optimiser.step

        def watched(factor):
            before = {name: value.clone() for name, value in run.guide.mean().items()}
            step(factor)
            seen.append({name for name, value in run.guide.mean().items() if not torch.equal(value, before[name])})

        run.optimiser.step = watched
        list(run)
        assert len(seen) == 2 * (3 + 1)
        for number, names in enumerate(seen):
            assert names
            assert names == {"head.weight"} if number % 4 < 3 else "head.weight" not in names

    def test_the_collapsed_program_agrees_with_weight_draws_in_expectation(self, make):
        model = make(dtype=torch.float64)
        posterior = fit(model, objective="mc", refit="none", guide=FullCovariance())
        guide, head = posterior.guide, LastLayerHead(model)
        batch = next(iter(model.encode(model.task.train).batches(12)))
        with torch.no_grad():
            features = model.features(batch, guide.mean())
            model.features = lambda batch, draw: features
            model.backbone.features = lambda batch, **kwargs: features
            exact = CollapsedProgram(head, guide, Objective("mc", 20_000))
            collapsed = TraceMeanField_ELBO().loss(exact, guide, batch)
            sampled = torch.tensor([TraceMeanField_ELBO().loss(model, guide, batch) for _ in range(400)])
        # five standard errors of 400 draws
        assert abs(collapsed - sampled.mean()) < 5 * sampled.std() / 20 + 0.05

    def test_logit_draws_have_less_gradient_noise_than_weight_draws(self, make):
        model = make(dtype=torch.float64)
        guide = fit(model, refit="none", guide=MeanField()).guide
        batch = next(iter(model.encode(model.task.train).batches(12)))
        with torch.no_grad():
            features = model.features(batch, guide.mean())
        model.backbone.features = lambda batch, **kwargs: features
        model.features = lambda batch, draw: features
        collapsed = CollapsedProgram(LastLayerHead(model), guide, Objective("mc", 1))
        spreads = []
        for program in (collapsed, model):
            grads = []
            for _ in range(150):
                guide.zero_grad()
                TraceMeanField_ELBO().loss_and_grads(program, guide, batch)
                grads.append(dict(guide.items())["head.weight"].loc.grad.clone())
            spreads.append(float(torch.stack(grads).var(0).sum()))
        assert spreads[0] < 0.5 * spreads[1]

    @pytest.mark.parametrize("mode", ["alternating", "joint"])
    def test_it_trains_block_by_block_with_the_head_always(self, make, mode):
        model = make()
        schedule = BlockSchedule(active=1, every=2)
        run = VBLL(steps=6, learning_rate=1e-2, mode=mode, schedule=schedule).iterate(model, model.task.train)
        for step in range(6):
            before = {name: value.clone() for name, value in run.guide.mean().items()}
            next(run.steps())
            active = run.optimiser.plan.entries(step // 2)
            for name, value in run.guide.mean().items():
                if name == "head.weight":
                    assert not torch.equal(value, before[name])
                    continue
                for entry in set(range(3)) - active[name]:
                    assert torch.equal(value[entry], before[name][entry])
                for entry in active[name] if name.endswith("theta") else ():
                    assert not torch.equal(value[entry], before[name][entry])

    def test_an_interrupted_fit_ends_where_an_uninterrupted_one_does(self, make, tmp_path):
        model = make(PoLAR(rank=2, layers=(1,)))
        whole = fit(model, steps=6)
        engine = VBLL(steps=6, learning_rate=1e-2, checkpoint=tmp_path, checkpoint_every=3)
        for _, _ in zip(range(3), engine.iterate(model, model.task.train), strict=False):
            pass
        resumed = engine.fit(model, model.task.train, progress=False)
        assert resumed.record["history"] == whole.record["history"]
        for name, value in whole.mean().items():
            assert torch.equal(resumed.mean()[name], value)

    def test_a_bayesian_core_composes_with_the_head(self, make):
        model = make()
        posterior = fit(model, guide={"*theta": MeanField(0.01), "head.weight": LowRankPrecision(12)})
        draws = posterior.sample(2)
        assert not torch.equal(*draws["q_proj.polar_theta"])
        assert torch.equal(*draws["q_proj.polar_X"])
        assert posterior.default_kind == "mc"
        assert posterior.predict(model.task.test, draws=3).probs.shape == (3, 9, 3)

    def test_a_bfloat16_network_has_a_float32_head(self, make):
        posterior = fit(make(dtype=torch.bfloat16))
        assert head_of(posterior).loc.dtype == torch.float32
        assert all(entry["loss"] == entry["loss"] for entry in posterior.record["history"])


@pytest.mark.parametrize("name", ["LoRA", "PoLAR", "PiSSA", "CorDA", "S2FT", "FullRank"])
def test_the_methods_prior_covers_every_adapter_and_keeps_off_the_head(make, name):
    adapter = Adapter.registered[name]()
    prior = make(adapter, prior=declared_prior(METHODS["vbll"].prior)).prior.to_dict()
    assert prior.pop("head.weight")["prior"] == "logit_scale"
    assert {entry["prior"] for entry in prior.values()} - {"UniformStiefel"} == {"Normal"}


class TestNaturalSteps:
    @pytest.mark.parametrize("guide", [BlockCovariance(), ClassContrasts()], ids=str)
    def test_with_all_data_they_end_where_the_refit_does(self, make, guide):
        model = make(dtype=torch.float64)
        refitted = fit(model, guide=guide, steps=1, objective="tilted", refit="tilted", learning_rate=1e-12)
        run = VBLL(guide=guide, steps=1, objective="tilted", warm_start=False).iterate(model, model.task.train)
        features = FeatureCache(None).features(model, refitted.mean(), model.task.train)
        head, factor = LastLayerHead(model), dict(run.guide.items())["head.weight"]
        data = HeadData.of(head, features.values, features.labels)
        for _ in range(200):
            natural_step(head, factor, data, Objective("tilted"), 0.5)
        found, expected = (
            (other.loc.detach(), (other.scale_tril @ other.scale_tril.mT).detach())
            for other in (factor, head_of(refitted))
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)

    def test_a_whole_step_is_exact_for_a_gaussian_likelihood(self, make):
        model = make(dtype=torch.float64)
        run = VBLL(guide=BlockCovariance(), steps=1, warm_start=False).iterate(model, model.task.train)
        head, factor = LastLayerHead(model), dict(run.guide.items())["head.weight"]
        columns = factor.loc.shape[1]
        inputs, targets = torch.randn(9, columns, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
        data = HeadData(inputs, torch.zeros_like(targets), targets)
        natural_step(head, factor, data, GaussianObjective(torch.full((3,), 0.5, dtype=torch.float64)), 1.0)
        scale = float(head.normal_prior()[1][0, 0])
        precision = inputs.mT @ inputs / 0.25 + torch.eye(columns, dtype=torch.float64) / scale**2
        covariance = torch.linalg.inv(precision)
        tril = factor.scale_tril.detach()
        torch.testing.assert_close(tril @ tril.mT, covariance.expand(3, -1, -1), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(
            factor.loc.detach(), (covariance @ inputs.mT @ targets / 0.25).mT, atol=1e-12, rtol=1e-9
        )

    def test_training_with_them_moves_the_head_and_lowers_the_loss(self, make):
        settings = {"steps": 12, "head_step": "natural", "refit": "none", "warm_start": False, "objective": "tilted"}
        posterior = fit(make(), guide=BlockCovariance(), **settings)
        losses = [entry["loss"] for entry in posterior.record["history"]]
        assert sum(losses[-3:]) < sum(losses[:3])
        other = fit(make(), guide=ClassContrasts(), **settings)
        assert other.mean()["head.weight"].isfinite().all()

    def test_what_they_refuse(self, make):
        with pytest.raises(ValueError, match=r"the guide of head\.weight is a MeanField\. Use guide=BlockCovariance"):
            fit(make(), guide=MeanField(), head_step="natural")
        with pytest.raises(ValueError, match="Use mode='alternating'"):
            VBLL(head_step="natural", mode="joint")
        with pytest.raises(ValueError, match=r"Unknown head_step 'naturl' for VBLL\. Did you mean 'natural'"):
            VBLL(head_step="naturl")
        with pytest.raises(ValueError, match="natural_rate is a length above 0 and at most 1; got 2"):
            VBLL(natural_rate=2.0)


class TestRefit:
    @pytest.mark.parametrize("refit", ["jensen", "tilted", "bohning", "tightest", "mc"])
    def test_the_head_is_at_the_optimum_of_the_refit(self, make, refit):
        model = make()
        fitted = fit(model, refit=refit)
        again = VBLL(refit=refit).fit(model, model.task.train, estimate=fitted, progress=False)
        assert again.record["refit_loss"] == pytest.approx(fitted.record["refit_loss"], rel=1e-4)
        first, second = (
            posterior.predict(model.task.test, kind="linearised_mf1").probs for posterior in (fitted, again)
        )
        assert (first - second).abs().max() < 1e-3

    @pytest.mark.parametrize("guide", [MeanField(), LowRankPrecision(3), FullCovariance(), None], ids=str)
    def test_any_normal_family_is_refitted(self, make, guide):
        posterior = fit(make(), guide=guide)
        assert posterior.record["refit_loss"] > 0
        assert "linearised_mf1" in posterior.kinds

    def test_the_default_trains_with_a_low_rank_and_its_refit_finds_the_whole_covariance(self, make, monkeypatch):
        monkeypatch.setattr("pyrolora.inference.vbll.engine.TRAINING_RANK", 3)
        model = make()
        engine = VBLL(steps=4, learning_rate=1e-2)
        run = engine.iterate(model, model.task.train)
        trained = LastLayerHead(model).factor(run.guide)
        assert trained.distribution().factor.shape[-1] == 3
        whole = fit(model)
        assert head_of(whole).distribution().factor.shape[-1] == len(model.task.train)
        # the network is that of training with the low rank, the head what a fit on top of it finds
        fixed = fit(model, guide=LowRankPrecision(3))
        assert torch.equal(whole.mean()["q_proj.polar_theta"], fixed.mean()["q_proj.polar_theta"])
        on_top = VBLL().fit(model, model.task.train, estimate=fixed, progress=False)
        for name, value in head_of(on_top).state_dict().items():
            assert torch.equal(head_of(whole).state_dict()[name], value)
        assert whole.record["refit_loss"] < fixed.record["refit_loss"]
        # where nothing follows, or nothing of low rank can follow, the guide is whole from the start
        assert head_of(fit(model, refit="none")).distribution().factor.shape[-1] == len(model.task.train)

    def test_class_contrasts_are_trained_refitted_and_refused_where_a_shift_counts(self, make):
        posterior = fit(make(), guide=ClassContrasts(), objective="tilted", refit="mc")
        assert posterior.record["refit_loss"] > 0
        probs = posterior.predict(posterior.model.task.train, kind="linearised_mf1").mean_probs
        assert (probs.sum(-1) - 1).abs().max() < 1e-5
        shift = float(head_of(posterior).distribution().shift_scale.detach())
        assert shift == pytest.approx(posterior.record["prior_scale"] / 3**0.5, rel=1e-5)
        with pytest.raises(ValueError, match="objective='jensen' is a bound that the variance of a shift"):
            fit(make(), guide=ClassContrasts(), refit="mc")
        with pytest.raises(ValueError, match="refit='jensen' is a bound that the variance of a shift"):
            fit(make(), guide=ClassContrasts(), objective="mc", refit="jensen")

    def test_laplace_keeps_the_mean_and_takes_the_inverse_of_each_block(self, make):
        model = make(dtype=torch.float64)
        plain = fit(model, refit="none", guide=BlockCovariance())
        refined = fit(model, refit="laplace", guide=BlockCovariance())
        assert torch.equal(plain.mean()["head.weight"], refined.mean()["head.weight"])
        features = FeatureCache(None).features(model, plain.mean(), model.task.train).values
        head = LastLayerHead(model)
        weights = plain.mean()["head.weight"].clone().requires_grad_()

        def loss(flat):
            logits = head.logits(features, flat.reshape(1, *weights.shape))[0]
            labels = torch.tensor([example.label for example in model.task.train])
            prior = 0.5 * (flat / float(head.normal_prior()[1][0, 0])).square().sum()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + prior

        hessian = torch.autograd.functional.hessian(loss, weights.detach().flatten())
        size = weights.shape[1]
        whole = torch.linalg.inv(hessian)
        for k in range(3):
            block = slice(k * size, (k + 1) * size)
            root = head_of(refined).scale_tril[k]
            covariance = root @ root.mT
            expected = torch.linalg.inv(hessian[block, block])
            assert (covariance - expected).abs().max() < 1e-8 * expected.abs().max()
            # the blocks of the inverse are another thing, and the comparison above tells them apart
            assert (whole[block, block] - expected).abs().max() > 1e-3 * expected.abs().max()

    def test_a_learned_prior_scale_moves_to_its_optimum(self, make):
        prior = {**PRIOR, "head.weight": logit_scale(2.0, learned=True)}
        fixed, moved = fit(make()), fit(make(prior=prior))
        assert fixed.record["prior_scale"] != pytest.approx(moved.record["prior_scale"], rel=0.01)

    @pytest.mark.parametrize("head", [learned(0.1), logit_scale(2.0, learned=True)], ids=["weights", "logits"])
    def test_a_learned_scale_starts_training_where_it_was_declared(self, make, head):
        starts = []
        for warm in (False, True):
            model = make(LoRA(rank=2), prior={"*.lora_*": dist.Normal(0.0, 1.0), HEAD: head})
            VBLL(warm_start=warm).iterate(model, model.task.train)
            starts.append(float(model.prior.scales[HEAD]))
        assert starts[1] == starts[0]

    def test_a_scale_for_each_class_is_refused(self, make):
        model = make(prior={**PRIOR, "head.weight": learned(0.1, per="class")})
        with pytest.raises(ValueError, match=r"finds one prior scale, and 3 are declared\. Leave per= out"):
            fit(model)

    def test_prior_scales_are_in_units_of_a_logit(self, make):
        model = make(prior={**PRIOR, "head.weight": logit_scale(3.0)})
        fit(model)
        features = FeatureCache(None).features(model, model.initial(torch.Generator().manual_seed(0)), model.task.train)
        expected = 3.0 / features.values.square().sum(-1).mean().sqrt()
        assert float(model.prior.scales["head.weight"]) == pytest.approx(float(expected), rel=1e-4)


def repeated(split):
    return Split(split.name, split.task, tuple(split) * 2, split.classes)


class TestColdPosteriors:
    """A posterior at ``kl_weight=0.5`` is that of all rows seen twice."""

    @pytest.fixture
    def model(self, make):
        return make(LoRA(rank=2), dtype=torch.float64)

    @staticmethod
    def check(first, second, tolerance):
        roots = [factor.scale_tril.detach() for factor in (first, second)]
        means = [factor.mean().detach() for factor in (first, second)]
        for mine, theirs in (means, [root @ root.mT for root in roots]):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))

    @pytest.mark.parametrize(
        ("refit", "guide", "tolerance"),
        [
            ("tilted", BlockCovariance(), 1e-9),
            ("bohning", BlockCovariance(), 1e-9),
            ("laplace", BlockCovariance(), 1e-9),
            # natural gradients crawl along the shift of all classes under Jensen's bound, and L-BFGS ends near the optimum
            ("jensen", BlockCovariance(), 1e-4),
            ("tilted", FullCovariance(), 1e-5),
        ],
        ids=str,
    )
    def test_the_refit(self, model, refit, guide, tolerance):
        estimate = fit(model, guide=guide, refit="none")
        twice = repeated(model.task.train)
        cold, warm, plain = (
            VBLL(guide=guide, refit=refit, kl_weight=weight).fit(model, data, estimate=estimate, progress=False)
            for weight, data in ((0.5, model.task.train), (1.0, twice), (1.0, model.task.train))
        )
        self.check(head_of(cold), head_of(warm), tolerance)
        if refit != "laplace":
            assert cold.record["refit_loss"] == pytest.approx(0.5 * warm.record["refit_loss"], rel=1e-6)
        with pytest.raises(AssertionError):
            self.check(head_of(cold), head_of(plain), 100 * tolerance)

    def test_the_warm_start(self, model):
        engine = VBLL(guide=BlockCovariance(), objective="tilted")
        cold = dataclasses.replace(engine, kl_weight=0.5).iterate(model, model.task.train)
        warm = engine.iterate(model, repeated(model.task.train))
        # other batches round otherwise, and the loss is within 1e-10 of its optimum
        self.check(head_of(cold), head_of(warm), 1e-7)

    def test_training_and_its_refit(self, model):
        spreads = [
            float(head_of(fit(model, kl_weight=weight)).distribution().variance.mean().detach())
            for weight in (1.0, 0.1, 0.01)
        ]
        # the mean is over all weights, most of which lie outside the span of the features and keep the prior's width
        assert spreads[0] > 1.05 * spreads[1] > 1.1 * spreads[2]


class TestPostTraining:
    def test_it_leaves_everything_below_the_head_where_it_was(self, three_topics_model, make):
        below = three_topics_model(torch.float32, adapter=LoRA(rank=2))
        estimate = MAP(steps=3).fit(below, below.task.train, progress=False)
        model = make(LoRA(rank=2))
        posterior = VBLL().fit(model, model.task.train, estimate=estimate, progress=False)
        for name, value in estimate.mean().items():
            assert torch.equal(posterior.mean()[name], value)
        assert head_of(posterior).distribution().variance.min() > 0

    def test_an_estimate_of_a_prior_declared_alike_keeps_its_learned_scales(self, make):
        prior = {
            "*.lora_*": learned(0.5, strength=0.0, after=0.0),
            "head.weight": learned(0.1, strength=0.0, after=0.0),
        }
        model = make(LoRA(rank=2), prior=prior)
        estimate = fit(model, steps=20, refit="none")
        kept = {name: float(scale) for name, scale in estimate.model.prior.scales.items()}
        assert all(abs(kept[name] / declared - 1) > 0.05 for name, declared in (("q_proj.lora_A", 0.5), (HEAD, 0.1)))
        on_top = VBLL(refit="none").fit(model, model.task.train, estimate=estimate, progress=False)
        assert {name: float(scale) for name, scale in on_top.model.prior.scales.items()} == kept
        # a refit of the head finds that scale anew and leaves the others where the estimate has them
        again = VBLL().fit(model, model.task.train, estimate=estimate, progress=False)
        assert float(again.model.prior.scales["q_proj.lora_A"]) == kept["q_proj.lora_A"]

    def test_an_estimate_of_another_prior_leaves_the_scales_declared(self, make):
        below = make(LoRA(rank=2), prior={"*.lora_*": dist.Normal(0.0, 1.0), HEAD: logit_scale(4.0)})
        estimate = fit(below, steps=1, refit="none")
        model = make(LoRA(rank=2), prior={"*.lora_*": dist.Normal(0.0, 1.0), HEAD: logit_scale(2.0)})
        on_top = VBLL(refit="none").fit(model, model.task.train, estimate=estimate, progress=False)
        scale, other = (float(one.model.prior.scales[HEAD]) for one in (on_top, estimate))
        assert scale == pytest.approx(other / 2, rel=1e-5)

    def test_layers_of_every_form(self, make):
        probs = {}
        for form in ({}, {"bias": True}, {"centre": "zero"}, {"identified": True}):
            model = make(LoRA(rank=2), **form)
            posterior = fit(model, steps=1)
            probs[str(form)] = posterior.predict(model.task.test, kind="linearised").mean_probs
            assert posterior.mean()["head.weight"].shape == (3 - ("identified" in form), 32 + ("bias" in form))
        values = list(probs.values())
        assert all((values[0] - other).abs().max() > 1e-6 for other in values[1:])

    def test_a_zero_centre_starts_at_equal_logits(self, make):
        model = make(LoRA(rank=2), centre="zero")
        batch = next(iter(model.encode(model.task.train).batches(4)))
        assert not model.row_logits(batch, model.initial()).any()

    def test_two_classes_in_identified_form_have_exact_quadrature(self, three_topics, tiny_llama, tiny_tokenizer):
        from pyrolora.models.backbones import Backbone
        from pyrolora.models.program import BayesianModel
        from pyrolora.models.tasks import Example, Task, Verbaliser

        labels = ("sport", "business")
        rows = [Example(e.fields, e.label % 2, id=e.id) for e in three_topics(train=20).train.examples]
        split = Split("train", "two", tuple(rows), 2)
        task = Task("two", labels, Verbaliser("text : {text} topic :", labels=labels), split, split, split, "", "")
        model = BayesianModel(
            Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny"),
            task,
            LastLayer(identified=True),
            logit_scale(4.0),
        )
        posterior = VBLL(steps=1, refit="gauss_hermite").fit(model, split, progress=False)
        assert posterior.mean()["head.weight"].shape == (1, 32)
        exact = posterior.predict(split, kind="linearised_quadrature").mean_probs
        draws = posterior.predict(split, kind="linearised").mean_probs
        assert (exact - draws).abs().max() < 0.01
        assert (posterior.predict(split, kind="linearised_mf1").mean_probs - exact).abs().max() < 0.016


class TestPrediction:
    @pytest.fixture
    def posterior(self, make):
        return fit(make())

    @pytest.mark.parametrize("draws", [1, 10, 300])
    @pytest.mark.parametrize("kind", ["linearised", "linearised_mf1", "linearised_probit", "mc", "mean"])
    def test_one_pass_of_the_network_for_any_number_of_draws(self, posterior, kind, draws):
        model, passes = posterior.model, []
        original = model.backbone.body.forward
        model.backbone.body.forward = lambda *args, **kwargs: (passes.append(1), original(*args, **kwargs))[1]
        probs = posterior.predict(model.task.test, kind=kind, draws=draws, batch_size=9).probs
        assert len(passes) == 1
        assert probs.shape[0] == {"linearised": LOGIT_DRAWS, "mc": draws}.get(kind, 1)

    def test_kinds_agree_and_repeat_under_a_seed(self, posterior):
        test = posterior.model.task.test
        seeded = [posterior.predict(test, generator=torch.Generator().manual_seed(3)).probs for _ in range(2)]
        assert torch.equal(*seeded)
        weights = posterior.predict(test, kind="mc", draws=4000).mean_probs
        assert (seeded[0].mean(0) - weights).abs().max() < 0.02
        assert (posterior.predict(test, kind="linearised_mf1").mean_probs - weights).abs().max() < 0.06

    def test_weight_draws_equal_those_through_the_network(self, posterior):
        model = posterior.model
        sampled = posterior.sample(5, generator=torch.Generator().manual_seed(1))
        slow = {}
        for batch in model.encode(model.task.test).batches(9):
            slow = model.logits(batch, sampled).softmax(-1)
            fast = posterior.predict(batch, kind="mc", draws=5, generator=torch.Generator().manual_seed(1)).probs
            assert (slow - fast).abs().max() < 1e-5

    @pytest.mark.parametrize("kind", ["mc", "mean", "linearised", "linearised_mf1"])
    def test_a_logit_temperature_tempers_every_kind(self, posterior, kind):
        warm = type(posterior)(posterior.model, posterior.guide, {**posterior.record, "logit_temperature": 2.0})
        arguments = {"draws": 3, "kind": kind}
        plain, tempered = (
            one.predict(one.model.task.test, generator=torch.Generator().manual_seed(0), **arguments).probs
            for one in (posterior, warm)
        )
        root = plain.double().sqrt()
        torch.testing.assert_close(tempered.double(), root / root.sum(-1, keepdim=True), atol=1e-6, rtol=0)

    def test_energies_are_those_of_draws_through_the_network(self, posterior):
        model = posterior.model
        batch = next(iter(model.encode(model.task.test).batches(12)))
        draws = posterior.sample(3, generator=torch.Generator().manual_seed(0))
        direct = -model.logits(batch, draws).logsumexp(-1).detach()
        seen = posterior.predict(batch, kind="mc", draws=3, generator=torch.Generator().manual_seed(0)).energy
        torch.testing.assert_close(seen, direct, atol=1e-4, rtol=0)

    def test_uncertainty_splits(self, posterior):
        split = decompose(posterior.predict(posterior.model.task.test).probs)
        assert (split.total - split.aleatoric - split.epistemic).abs().max() < 1e-6
        assert split.epistemic.min() > 0

    def test_a_vanishing_variance_is_the_mean(self, posterior):
        narrow = Posterior(posterior.model, copy.deepcopy(posterior.guide), {})
        with torch.no_grad():
            head_of(narrow).log_precision.add_(40)
        test = posterior.model.task.test
        mean = narrow.predict(test, kind="mean").mean_probs
        for kind in ("linearised", "linearised_mf1", "mc"):
            assert (narrow.predict(test, kind=kind).mean_probs - mean).abs().max() < 1e-4

    def test_last_layer_laplace_predicts_in_one_pass_too(self, make):
        model = make(LoRA(rank=2), prior={"*.*_*": dist.Normal(0.0, 1.0), "head.weight": dist.Normal(0.0, 0.1)})
        posterior = Laplace(structure="last_layer", estimate=MAP(steps=2)).fit(model, model.task.train, progress=False)
        passes, original = [], model.backbone.body.forward
        model.backbone.body.forward = lambda *args, **kwargs: (passes.append(1), original(*args, **kwargs))[1]
        posterior.predict(model.task.test, kind="mc", draws=50, batch_size=9)
        assert len(passes) == 1

    def test_it_survives_saving(self, posterior, tmp_path):
        loaded = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "p"), model=posterior.model)
        assert type(loaded) is type(posterior)
        probs = [p.predict(posterior.model.task.test, kind="linearised_mf1").probs for p in (posterior, loaded)]
        assert torch.equal(*probs)


class TestRefusals:
    def test_settings(self):
        for settings, message in (
            ({"refit": "tilt"}, r"Unknown refit 'tilt' for VBLL\. Did you mean 'tilted'"),
            ({"mode": "both"}, r"Unknown mode 'both' for VBLL"),
            ({"objective": "jenson"}, r"Unknown objective 'jenson'\. Did you mean 'jensen'"),
            ({"head_steps": 0}, r"head_steps must be at least 1; got 0"),
            ({"head_learning_rate": 0.0}, r"head_learning_rate must be positive"),
            ({"steps": 0}, r"steps must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                VBLL(**settings)
        with pytest.raises(TypeError, match="expected one of"):
            VBLL(guide=MeanField)

    def test_a_model_without_a_last_layer(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=LoRA(rank=2))
        with pytest.raises(ValueError, match=r"Add LastLayer\(\) to the model's adapters"):
            fit(model)

    def test_a_prior_that_is_no_normal_or_has_no_width(self, make):
        with pytest.raises(ValueError, match=r"needs a Normal prior on head\.weight; it is a Laplace"):
            fit(make(prior={**PRIOR, "head.weight": dist.Laplace(0.0, 1.0)}))
        with pytest.raises(ValueError, match="scale of a learned prior must be positive; got 0"):
            logit_scale(0.0)

    def test_a_class_never_seen(self, make):
        model = make()
        some = Split("train", "three_topics", tuple(e for e in model.task.train if e.label != 2), 3)
        with pytest.raises(ValueError, match=r"No training example has the class 'politics'.*Raise train_size"):
            VBLL(steps=1).fit(model, some, progress=False)

    def test_features_and_labels_out_of_range(self, make):
        model = make()
        head = LastLayerHead(model)
        features, labels = torch.randn(4, 32), torch.tensor([0, 1, 2, 3])
        with pytest.raises(ValueError, match=r"label 3 of row 3 is none of the 3 classes"):
            HeadData.of(head, features, labels)
        features[1, 3] = torch.inf
        with pytest.raises(ValueError, match=r"features of row 1 are not finite \(1 such rows of 4\)"):
            HeadData.of(head, features, labels.clamp_max(2))

    def test_an_estimate_of_other_sites(self, make, three_topics_model):
        below = three_topics_model(torch.float32, adapter=LoRA(rank=3))
        estimate = MAP(steps=1).fit(below, below.task.train, progress=False)
        model = make(LoRA(rank=2))
        with pytest.raises(ValueError, match=r"The estimate has no value for the site 'q_proj\.lora_A'"):
            VBLL().fit(model, model.task.train, estimate=estimate, progress=False)

    def test_another_adapter_of_the_label_rows(self, three_topics, tiny_llama, tiny_tokenizer):
        """Embeddings that are the output embedding too: features and head.weight do not make the logits alone."""
        backbone = Backbone(tiny_llama(tie_word_embeddings=True), tiny_tokenizer, "tied")
        model = BayesianModel(backbone, three_topics(), [FullRank(embeddings=True, targets=["q_proj"]), LastLayer()])
        with pytest.raises(ValueError, match="FullRank changes the label rows as well"):
            VBLL(steps=1).fit(model, model.task.train, progress=False)
        # where only the head is random its draws must still go through the network
        posterior = SVI(
            guide={"*proj*": Point(), "embed*": Point(), "head*": MeanField()}, steps=1, max_grad_norm=1.0
        ).fit(model, model.task.train, progress=False)
        with torch.no_grad():
            next(dict(posterior.guide.items())["embed_tokens.weight"].parameters()).add_(0.3)
        draws = posterior.sample(2, generator=torch.Generator().manual_seed(0))
        batch = next(iter(model.encode(model.task.test).batches(12)))
        direct = model.logits(batch, draws).softmax(-1)
        seen = posterior.predict(batch, kind="mc", draws=2, generator=torch.Generator().manual_seed(0)).probs
        torch.testing.assert_close(seen, direct.detach(), atol=1e-5, rtol=0)

    def test_a_network_that_caps_its_logits(self, make):
        model = make()
        model.backbone.network.config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError, match="caps its logits"):
            fit(model)

    def test_laplace_refinement_of_a_family_that_cannot_hold_it(self, make):
        with pytest.raises(ValueError, match="MeanField posterior cannot hold Laplace's covariance"):
            fit(make(), refit="laplace", guide=MeanField())

    def test_a_point_at_the_head_is_left_to_map(self, make):
        model = make()
        with pytest.raises(ValueError, match="VBLL needs a Normal posterior"):
            fit(model, guide=Point())


def test_svi_fits_the_same_model(make):
    """The site is an ordinary one: SVI with weight draws works on it as well."""
    model = make(LoRA(rank=2))
    guide = {"*.lora_*": Point(), "head.weight": LowRankPrecision(4)}
    posterior = SVI(guide=guide, steps=3).fit(model, model.task.train, progress=False)
    assert posterior.record["history"][-1]["kl"] > 0
