"""Members put together, merged for each task, judged on episodes: identities between the meanings of merge weights."""

import pytest
import torch

from pyrolora.guides import BLoB, Dirichlet, LowRank, MeanField, Point
from pyrolora.inference.evaluation import few_shot
from pyrolora.inference.evaluation.few_shot import evaluate_episodes
from pyrolora.inference.meta_tuning import MetaTuning
from pyrolora.inference.perturbations import PGD, WeightPerturbation, cross_entropy_objective
from pyrolora.inference.perturbations.target import AttackTarget
from pyrolora.inference.pool import TaskMerging, member_slice, mixture_prior, pool_of
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LoRA, LoRAPool, PiSSA
from pyrolora.models.merging import MergeRule, class_scores
from pyrolora.models.prior_declarations import Flat, Relative, learned
from pyrolora.models.program import BayesianModel
from pyrolora.models.prototypes import prototype_logits
from pyrolora.models.serving import merged
from pyrolora.models.tasks import Augmentation, episodic, support_of
from pyrolora.models.trimming import Trim, trimmed

MEMBER = PiSSA(rank=2, targets="all-linear")


@pytest.fixture(scope="module")
def source(three_shapes):
    return episodic(three_shapes(train=30, validation=9, test=9), ways=2, shots=2, queries=3, counts=(8, 2, 5))


@pytest.fixture(scope="module")
def model(source, tiny_vision):
    return BayesianModel(tiny_vision(torch.float64), source, adapter=MEMBER, prior=Relative(0.1))


def member_of(model, seed, guide=None):
    """A posterior of a member somewhere, as training might leave it."""
    engine = MetaTuning(guide=guide or Point(), steps=1, perturbation=WeightPerturbation("none", 0.0))
    posterior = engine.fit(model, model.task.train, progress=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in posterior.guide.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return posterior


@pytest.fixture(scope="module")
def members(model):
    return [member_of(model, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def pool(members):
    return pool_of(members)


@pytest.fixture(scope="module")
def batch(model):
    return model.encode(model.task.test).batch(list(range(18)))


@pytest.fixture
def weights():
    return torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 0.0, 1.0]], dtype=torch.float64)


def probabilities(target, batch):
    return target(batch["pixel_values"]).softmax(-1)


class TestAssembly:
    @pytest.mark.parametrize("guide", [Point(), MeanField(init_scale=0.05), BLoB(init_scale=0.05)])
    def test_members_stand_side_by_side(self, model, guide, tmp_path):
        parts = [member_of(model, seed, guide) for seed in range(2)]
        pool = pool_of(parts)
        adapter = pool.model.adapters[0]
        for number, part in enumerate(parts):
            for name, value in member_slice(adapter, pool.mean(), number).items():
                assert torch.equal(value, part.mean()[name])
        draw = pool.sample(1, generator=torch.Generator().manual_seed(0))
        slices = [member_slice(adapter, {n: v[0] for n, v in draw.items()}, number) for number in range(2)]
        terms = sum(
            part.log_prob({n: v[None] for n, v in one.items()}) for part, one in zip(parts, slices, strict=True)
        )
        torch.testing.assert_close(pool.log_prob(draw), terms, rtol=1e-6, atol=1e-6)
        again = Posterior.from_pretrained(pool.save_pretrained(tmp_path / "pool"), model=pool.model)
        assert all(torch.equal(value, pool.mean()[name]) for name, value in again.mean().items())

    def test_one_hot_weights_predict_as_the_member(self, model, members, pool, batch):
        for number, member in enumerate(members):
            draw = {**pool.mean(), "pool.weights": torch.eye(3, dtype=torch.float64)[number]}
            expected = model.row_logits(batch, member.mean())
            torch.testing.assert_close(pool.model.row_logits(batch, draw), expected, atol=1e-10, rtol=0)

    def test_what_does_not_fit_is_refused(self, model, members, source, tiny_vision, three_shapes):
        with pytest.raises(ValueError, match="the list of posteriors is empty"):
            pool_of([])
        wider = BayesianModel(model.backbone, source, adapter=PiSSA(rank=3, targets="all-linear"))
        with pytest.raises(ValueError, match="Members differ in their adapters"):
            pool_of([members[0], member_of(wider, 0)])
        plain = BayesianModel(model.backbone, source, adapter=LoRA(rank=2))
        with pytest.raises(ValueError, match="one PiSSA adapter; this posterior's model has LoRA"):
            pool_of([member_of(plain, 0)])
        with pytest.raises(ValueError, match="was learned for this member alone"):
            pool_of([member_of(BayesianModel(model.backbone, model.task, adapter=MEMBER, prior=learned(0.1)), 0)])
        other = BayesianModel(tiny_vision(torch.float64, num_hidden_layers=3), source, adapter=MEMBER)
        with pytest.raises(ValueError, match="different backbones"):
            pool_of([members[0], member_of(other, 0)])
        turned = {name: -value for name, value in model.constants.items()}
        with pytest.raises(ValueError, match="share no residual"):
            pool_of([members[0], member_of(model.with_constants(turned), 0)])
        weaker = BayesianModel(model.backbone, source, MEMBER, Relative(0.2), constants=model.constants)
        with pytest.raises(
            ValueError, match=r"prior of 'q_proj.lora_A': Relative\(ratio=0.1\) and Relative\(ratio=0.2\)"
        ):
            pool_of([members[0], member_of(weaker, 0)])
        fewer = episodic(three_shapes(train=30, validation=9, test=9), ways=2, shots=1, queries=3, counts=(8, 2, 5))
        asked = BayesianModel(model.backbone, fewer, MEMBER, Relative(0.1), constants=model.constants)
        with pytest.raises(ValueError, match=r"ways=2, shots=2, queries=3.* and .*ways=2, shots=1, queries=3"):
            pool_of([members[0], member_of(asked, 0)])
        with pytest.raises(ValueError, match="Members differ in the guide"):
            pool_of([members[0], member_of(model, 0, MeanField())])
        with pytest.raises(ValueError, match="LowRank ties the weights"):
            pool_of([member_of(model, 0, LowRank(rank=2))])


class TestScores:
    def test_one_shot_without_augmentation_has_no_intra_score(self, three_shapes, tiny_vision):
        source = episodic(three_shapes(train=30), ways=3, shots=1, queries=2, counts=(4, 2, 4))
        pool = pool_of(
            [member_of(BayesianModel(tiny_vision(torch.float64), source, adapter=MEMBER), s) for s in range(2)]
        )
        batch = pool.model.encode(source.test).batch(list(range(12)))
        plain = TaskMerging(pool, MergeRule(top=2), augmentation=None)
        similarity, labels = plain.similarity(batch)
        intra, _ = class_scores(similarity, labels[:, None].expand(-1, 2, -1))
        torch.testing.assert_close(intra, torch.ones(2, 2, dtype=torch.float64), atol=1e-12, rtol=0)
        similarity, labels = TaskMerging(pool, copies=3).similarity(batch, torch.Generator().manual_seed(0))
        assert similarity.shape == (2, 2, 9, 3)
        intra, _ = class_scores(similarity, labels[:, None].expand(-1, 2, -1))
        assert (intra < 0.9999).all()

    def test_members_are_scored_by_their_own_features(self, members, pool, batch):
        similarity, labels = TaskMerging(pool, augmentation=None).similarity(batch)
        assert torch.equal(labels, batch["support_labels"])
        for number, member in enumerate(members):
            member.model.bind(batch, member.mean())
            features = member.model.head.features(batch["support"])
            expected = prototype_logits(features, features, batch["support_labels"], 2, scale=1.0)
            torch.testing.assert_close(similarity[:, number], expected, atol=1e-10, rtol=0)
        member.model.release()

    def test_attacked_images_are_further_from_their_prototypes(self, pool, batch):
        plain, attacked = (
            TaskMerging(pool, augmentation=None, attack=attack).similarity(batch, torch.Generator().manual_seed(0))
            for attack in (None, PGD(0.05, steps=4))
        )
        labels = plain[1][:, None].expand(-1, 3, -1)
        gaps = [class_scores(one[0], labels) for one in (plain, attacked)]
        assert (gaps[1][0] - gaps[1][1] < gaps[0][0] - gaps[0][1]).all()

    def test_the_seed_decides_the_weights(self, pool, batch):
        merging = TaskMerging(pool, MergeRule(sharpness=20.0))
        first, again, other = (merging.weights(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        torch.testing.assert_close(first.sum(-1), torch.ones(3, dtype=torch.float64))


class TestMeanings:
    def test_a_merge_for_every_episode_is_each_episodes_own(self, pool, batch, weights):
        found = probabilities(TaskMerging(pool).target(batch, weights), batch)
        for episode in range(3):
            rows = slice(6 * episode, 6 * episode + 6)
            own = {
                name: value[episode : episode + 1] if name.startswith("support") else value[rows]
                for name, value in batch.items()
            }
            draw = {**pool.mean(), "pool.weights": weights[episode]}
            expected = pool.model.row_logits(own, draw).softmax(-1)
            torch.testing.assert_close(found[rows], expected, atol=1e-10, rtol=0)

    def test_the_mixture_is_the_mean_of_the_members_predictions(self, members, pool, batch, weights):
        found = probabilities(TaskMerging(pool, semantics="mixture").target(batch, weights), batch)
        each = torch.stack([member.model.row_logits(batch, member.mean()).softmax(-1) for member in members])
        expected = (weights.T.repeat_interleave(6, 1)[..., None] * each).sum(0)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)

    def test_all_agree_where_one_member_has_all_the_weight(self, pool, batch):
        one = torch.eye(3, dtype=torch.float64)
        mean, mixture, dirichlet = (
            probabilities(TaskMerging(pool, semantics=kind, weight_draws=3).target(batch, one), batch)
            for kind in ("mean", "mixture", "dirichlet")
        )
        torch.testing.assert_close(mixture, mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(dirichlet, mean, atol=1e-10, rtol=0)

    def test_a_dirichlet_ends_in_the_two_others(self, pool, batch, weights):
        def prediction(**settings):
            return probabilities(TaskMerging(pool, **settings).target(batch, weights, generator=source), batch)

        source = torch.Generator().manual_seed(0)
        sure = prediction(semantics="dirichlet", concentration=1e9, weight_draws=2)
        torch.testing.assert_close(sure, prediction(semantics="mean"), atol=1e-3, rtol=0)
        # of 400 draws that are almost one-hot; a share is off by less than 0.11 at 4.4 standard deviations
        merging = TaskMerging(pool, semantics="dirichlet", concentration=1e-3, weight_draws=400)
        points, shares = merging.spread(weights, source)
        assert (points.max(-1).values > 0.999).float().mean() > 0.97
        torch.testing.assert_close(points.mean(0), weights, atol=0.11, rtol=0)
        torch.testing.assert_close(shares.sum(0), torch.ones(3, dtype=torch.float64))

    def test_draws_of_a_dirichlet_have_its_moments(self, pool):
        weights = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
        merging = TaskMerging(pool, semantics="dirichlet", concentration=5.0, weight_draws=20000)
        points = merging.spread(weights, torch.Generator().manual_seed(0))[0][:, 0]
        exact = torch.distributions.Dirichlet(5.0 * weights[0])
        torch.testing.assert_close(points.sum(-1), torch.ones(20000, dtype=torch.float64))
        # standard errors are 0.0014 and, for variances, below 0.0004
        torch.testing.assert_close(points.mean(0), exact.mean, atol=0.007, rtol=0)
        torch.testing.assert_close(points.var(0), exact.variance, atol=0.002, rtol=0)

    def test_draws_of_the_factors_are_merged_draw_by_draw(self, model, batch, weights):
        pool = pool_of([member_of(model, seed, MeanField(init_scale=0.2)) for seed in range(3)])
        merging = TaskMerging(pool, semantics="mixture")
        found = probabilities(
            merging.target(batch, weights, draws=2, generator=torch.Generator().manual_seed(3)), batch
        )
        sampled = pool.sample(2, generator=torch.Generator().manual_seed(3))
        expected = torch.zeros_like(found)
        for number in range(2):
            for member in range(3):
                draw = {name: value[number] for name, value in sampled.items()}
                draw["pool.weights"] = torch.eye(3, dtype=torch.float64)[member]
                share = weights[:, member].repeat_interleave(6)[:, None] / 2
                expected += share * pool.model.row_logits(batch, draw).softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)

    def test_trimming_is_of_every_merge_by_itself(self, pool, batch, weights):
        trim = Trim(0.4, targets=("fc1", "v_proj"), layers=(1,))
        found = probabilities(TaskMerging(pool, trim=trim).target(batch, weights), batch)
        for episode in range(3):
            rows = slice(6 * episode, 6 * episode + 6)
            own = {
                name: value[episode : episode + 1] if name.startswith("support") else value[rows]
                for name, value in batch.items()
            }
            draw = {**pool.mean(), "pool.weights": weights[episode]}
            with merged(pool.model, draw, finish=trim.of(pool.model.backbone)) as network:
                value = network.get_submodule("layers.1.mlp.fc1").weight
                assert torch.linalg.matrix_rank(value) == int(0.4 * 16)
                expected = pool.model.head(own, (), None, 0).softmax(-1)
            torch.testing.assert_close(found[rows], expected, atol=1e-8, rtol=0)

    def test_the_truncation_of_a_mean_is_not_the_mean_of_truncations(self):
        pair = torch.randn(2, 6, 6, dtype=torch.float64)
        assert (trimmed(pair.mean(0), 0.5) - trimmed(pair, 0.5).mean(0)).abs().max() > 0.01


class TestAttackTarget:
    def test_it_is_the_mean_over_draws_with_gradients_to_pixels_alone(self, model, batch):
        posterior = member_of(model, 0, MeanField(init_scale=0.2))
        draw = posterior.sample(3, generator=torch.Generator().manual_seed(0))
        target = AttackTarget(model, batch, draw, 3)
        expected = model.logits(batch, draw).softmax(-1).mean(0)
        torch.testing.assert_close(probabilities(target, batch), expected, atol=1e-10, rtol=0)
        clean = cross_entropy_objective(target, batch["labels"])
        attacked = PGD(0.1, steps=4)(batch["pixel_values"], clean, torch.Generator().manual_seed(0))
        assert clean(attacked) > clean(batch["pixel_values"]) + 0.1
        assert all(parameter.grad is None for parameter in posterior.guide.parameters())

    def test_it_serves_images_of_classes_as_well(self, three_shapes_model):
        model = three_shapes_model()
        batch = model.encode(model.task.test).batch(list(range(6)))
        draw = {name: 0.3 * torch.randn(2, *site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        target = AttackTarget(model, batch, draw, 2)
        expected = model.logits(batch, draw).softmax(-1).mean(0)
        torch.testing.assert_close(probabilities(target, batch), expected, atol=1e-10, rtol=0)


class TestEvaluation:
    def test_figures_are_those_of_the_predictions(self, members, source):
        scores = evaluate_episodes(members[0], source.test, progress=False)
        predictive = members[0].predict(source.test, kind="mean")
        torch.testing.assert_close(scores.probs.flatten(0, 1), predictive.mean_probs, atol=1e-6, rtol=0)
        right = (predictive.mean_probs.argmax(-1) == predictive.labels).float()
        figures = scores.to_dict()
        assert figures["accuracy"] == pytest.approx(float(right.mean()))
        assert figures["nll"] == pytest.approx(float(-predictive.log_likelihood.mean()), abs=1e-5)
        with pytest.raises(ValueError, match="not attacked"):
            _ = scores.robust_accuracy

    def test_an_attack_lowers_accuracy_and_many_at_once_are_one_by_one(self, pool, source, monkeypatch):
        merging = TaskMerging(pool, MergeRule(sharpness=8.0), semantics="dirichlet", weight_draws=2)
        attack = PGD(0.2, steps=5)
        whole = evaluate_episodes(merging, source.test, attack=attack, progress=False)
        assert whole.robust_accuracy.mean() < whole.accuracy.mean()
        assert whole.weights.shape == (5, 3)
        monkeypatch.setattr(few_shot, "IMAGES_AT_ONCE", 1)
        single = evaluate_episodes(merging, source.test, attack=attack, progress=False)
        torch.testing.assert_close(single.weights, whole.weights)
        # of the Dirichlet the draws differ with the batches; the weights that it is around do not
        assert single.to_dict()["accuracy"] == pytest.approx(whole.to_dict()["accuracy"], abs=0.2)

    def test_a_foreign_domain_is_judged_with_the_models_episodes(self, members, tiny_vision):
        from pyrolora.models.tasks import task

        other = episodic(task("digits"), ways=2, shots=2, queries=3, counts=(2, 2, 4))
        assert len(evaluate_episodes(members[0], other.test, progress=False).accuracy) == 4

    def test_labelled_images_are_as_many_as_the_data_have(self, model, members, three_shapes):
        one = episodic(three_shapes(train=30, validation=9, test=9), ways=2, shots=1, queries=3, counts=(2, 2, 5))
        own = BayesianModel(model.backbone, one, adapter=MEMBER, prior=Relative(0.1), constants=model.constants)
        batch = own.encode(one.test).batch(list(range(30)))
        assert batch["support"].shape[:2] == (5, 2)
        expected = own.row_logits(batch, members[0].mean()).softmax(-1).float()
        found = evaluate_episodes(members[0], one.test, progress=False).probs.flatten(0, 1)
        torch.testing.assert_close(found, expected)
        with pytest.raises(ValueError, match="2 classes and 4 queries, and the model's have 2 and 6"):
            evaluate_episodes(members[0], episodic(three_shapes(train=30), ways=2, shots=2, queries=2).test)

    def test_no_episodes_are_refused(self, three_shapes_model):
        model = three_shapes_model()
        posterior = SVI(steps=1).fit(model, model.task.train, progress=False)
        with pytest.raises(ValueError, match="has no episodes"):
            evaluate_episodes(posterior, model.task.test)


class TestTuning:
    def test_the_pool_is_the_prior_of_one_adapter(self, model, pool, members, source):
        adapter = pool.model.adapters[0]
        weights = torch.tensor([0.1, 0.7, 0.2], dtype=torch.float64)
        prior = mixture_prior(pool, weights)
        for name, mean in prior.means.items():
            assert torch.equal(mean[1], members[1].mean()[name])
            expected = model.prior(model.sites[name]).stddev
            torch.testing.assert_close(prior.scales[name][1].expand_as(expected), expected)
        tuned = BayesianModel(model.backbone, source, adapter=adapter.member, prior=prior, constants=model.constants)
        engine = MetaTuning(steps=3, learning_rate=1e-3, perturbation=WeightPerturbation("none", 0.0))
        start = member_slice(adapter, pool.mean(), int(weights.argmax()))
        found = engine.fit(tuned, source.train, progress=False, start=start).mean()
        assert any(not torch.equal(value, start[name]) for name, value in found.items())
        assert float(prior.log_prob(found)) > float(prior.log_prob(member_slice(adapter, pool.mean(), 0)))

    def test_an_episode_is_tuned_on_its_labelled_images_alone(self, model, pool, source):
        encoded = model.encode(source.test)
        data = support_of(encoded, 2, Augmentation(flip=False), count=6)
        own = encoded.batch(list(range(12, 18)))
        batches = [data.batch(list(range(4 * step, 4 * step + 4))) for step in range(2)]
        assert all(torch.equal(batch["support"][0], own["support"][0]) for batch in batches)
        assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
        assert torch.equal(data.batch([4, 5, 6, 7])["pixel_values"], batches[1]["pixel_values"])
        prior = mixture_prior(pool, torch.tensor([0.2, 0.7, 0.1]))
        tuned = BayesianModel(model.backbone, source, adapter=MEMBER, prior=prior, constants=model.constants)
        engine = MetaTuning(steps=20, learning_rate=0.02, perturbation=WeightPerturbation("none", 0.0))
        start = member_slice(pool.model.adapters[0], pool.mean(), 1)
        fit = engine.fit(tuned, data, progress=False, start=start)
        history = [entry["nll"] for entry in fit.record["history"]]
        assert sum(history[-5:]) < sum(history[:5])
        assert fit.predict(own, kind="mean").probs.shape == (1, 6, 2)
        with pytest.raises(ValueError, match="has the episodes 0 to 4; got 5"):
            support_of(encoded, 5)

    def test_widths_come_from_the_members_or_from_their_prior(self, model, source):
        random = pool_of([member_of(model, seed, MeanField(init_scale=0.05)) for seed in range(2)])
        prior = mixture_prior(random, torch.tensor([0.5, 0.5]))
        for name, factor in random.guide.items():
            own = member_slice(random.model.adapters[0], {name: factor.distribution().stddev}, 1)[name]
            torch.testing.assert_close(prior.scales[name][1], own.detach())
        flat = BayesianModel(model.backbone, source, adapter=MEMBER, prior=Flat())
        with pytest.raises(ValueError, match="their prior there has no width"):
            mixture_prior(pool_of([member_of(flat, 0)]), torch.ones(1))

    def test_merge_weights_have_a_dirichlet_posterior(self, pool, source):
        adapter = LoRAPool(rank=2, targets="all-linear", members=3, concentration=1.0)
        model = BayesianModel(
            pool.model.backbone, source, adapter=adapter, prior=Relative(1e-4), constants=pool.model.constants
        )
        guide = {"*.lora_*": Point(), "pool.weights": Dirichlet()}
        engine = SVI(guide=guide, steps=5, noise="weight", scale_learning_rate=0.1, learning_rate=1e-9)
        posterior = engine.fit(model, source.train, progress=False, start=pool.mean())
        drawn = posterior.sample(200, generator=torch.Generator().manual_seed(0))["pool.weights"]
        torch.testing.assert_close(drawn.sum(-1), torch.ones(200, dtype=torch.float64))
        assert drawn.std(0).min() > 0.01
        assert posterior.predict(source.test, draws=3).probs.shape == (3, 30, 2)
        with pytest.raises(ValueError, match="A Dirichlet is a posterior over the simplex"):
            SVI(guide=Dirichlet(), steps=1).fit(model, source.train, progress=False)


class TestRefusals:
    def test_what_is_no_pool_or_has_no_episodes(self, members, three_topics_model):
        with pytest.raises(ValueError, match="Only a pool of LoRAs is merged"):
            TaskMerging(members[0])
        model = three_topics_model(adapter=LoRAPool(members=2, rank=2))
        with pytest.raises(ValueError, match=r"labelled images of an episode"):
            TaskMerging(SVI(guide=Point(), steps=1).fit(model, model.task.train, progress=False))

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"semantics": "means"}, "Did you mean 'mean'"),
            ({"copies": 0}, "copies must be at least 1"),
            ({"weight_draws": 0}, "weight_draws must be at least 1"),
            ({"concentration": 0.0}, "must be positive"),
            ({"concentration": float("nan")}, "is a finite number; got nan"),
            ({"copies": 1.5}, "is a whole number; got 1.5"),
        ],
    )
    def test_bad_settings(self, pool, settings, reason):
        with pytest.raises(ValueError, match=reason):
            TaskMerging(pool, **settings)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"rule": 0.03}, r"rule is a float; expected MergeRule, such as MergeRule\(sharpness=8.0\)\."),
            ({"rule": None}, "rule is a NoneType; expected MergeRule"),
            (
                {"augmentation": True},
                r"augmentation is a bool; expected Augmentation, such as Augmentation\(\), or None",
            ),
            ({"attack": 0.03}, r"attack is a float; expected PGD, such as PGD\(0.03\), or None"),
            ({"trim": 0.5}, r"trim is a float; expected Trim, such as Trim\(0.5\), or None"),
        ],
    )
    def test_objects_of_another_kind(self, pool, settings, reason):
        with pytest.raises(TypeError, match=reason):
            TaskMerging(pool, **settings)

    def test_numbers_of_draws_and_attacks_that_are_none(self, members, source):
        for draws in (0, -1):
            with pytest.raises(ValueError, match=f"at least 1 draw; got draws={draws}"):
                evaluate_episodes(members[0], source.test, draws=draws)
        with pytest.raises(TypeError, match=r"attack is a float; expected PGD, such as PGD\(0.03\), or None"):
            evaluate_episodes(members[0], source.test, attack=0.03)

    def test_episodes_without_a_size(self, source):
        with pytest.raises(
            TypeError, match=r"EpisodeSplit, expected encoded episodes, such as model.encode\(task.test"
        ):
            support_of(source.test, 0)

    def test_other_numbers_of_weights(self, pool):
        with pytest.raises(ValueError, match="3 members; got weights of shape"):
            mixture_prior(pool, torch.ones(2) / 2)
