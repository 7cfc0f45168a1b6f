"""Quality retaining: factor, bank, tasks' losses, and what training does with them (specification 3E, E7, E8, E12)."""

import dataclasses

import pytest
import torch

from pyrolora.inference.elbo import AnalyticELBO
from pyrolora.inference.map import MAP
from pyrolora.inference.retaining import LogitBank, QualityRetaining, RetainingMessenger
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import LastLayer, LoRA, MoEfiedLoRA

# two tasks, of two classes and of one
GROUPS = torch.tensor([0, 0, 1])


def bank(**settings):
    return LogitBank(QualityRetaining(**settings), GROUPS, torch.device("cpu"), torch.float64)


def random_logits(rows=5, seed=0):
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 2, 0])


class TestFactor:
    def test_nothing_and_no_gradient_where_the_bank_agrees(self):
        """E7a."""
        logits = random_logits(3).requires_grad_()
        one = bank()
        # a constant for each row, which no softmax sees
        one.logits = logits.detach() + torch.tensor([[1.0], [-3.0], [0.5]], dtype=torch.float64)
        factor = one.log_factor(logits, torch.arange(3))
        (slope,) = torch.autograd.grad(factor.sum(), logits)
        assert factor.abs().max() < 1e-14
        assert slope.abs().max() < 1e-14

    @pytest.mark.parametrize("direction", ["teacher", "student"])
    def test_the_divergence_is_torchs(self, direction):
        one = bank(temperature=3.0, weight=0.7, initial_loss=2.0, direction=direction)
        one.logits = random_logits(3, seed=1)
        logits = random_logits()
        sides = [
            torch.distributions.Categorical(logits=one.logits[LABELS] / 3),
            torch.distributions.Categorical(logits=logits / 3),
        ]
        expected = torch.distributions.kl_divergence(*(sides if direction == "teacher" else sides[::-1]))
        torch.testing.assert_close(one.log_factor(logits, LABELS), -0.7 / 2 * 9 * expected)

    def test_half_the_loss_doubles_the_gradient_of_that_task_alone(self):
        """E7b."""
        logits, one = random_logits().requires_grad_(), bank()
        one.logits = random_logits(3, seed=1)
        (before,) = torch.autograd.grad(one.log_factor(logits, LABELS).sum(), logits)
        one.losses[0] /= 2
        (after,) = torch.autograd.grad(one.log_factor(logits, LABELS).sum(), logits)
        first = GROUPS[LABELS] == 0
        torch.testing.assert_close(after[first], 2 * before[first])
        torch.testing.assert_close(after[~first], before[~first], rtol=0, atol=0)

    def test_an_empty_bank_is_uniform(self):
        """E7c: it acts as label smoothing, a tenth as strong as the label."""
        logits, temperature = random_logits(), 2.0
        uniform = torch.full((5, 3), 1 / 3, dtype=torch.float64)
        expected = torch.nn.functional.kl_div((logits / temperature).log_softmax(-1), uniform, reduction="none").sum(-1)
        torch.testing.assert_close(bank().log_factor(logits, LABELS), -(temperature**2) * expected / 10)

    def test_the_gradient_is_a_soft_labels(self):
        logits, one = random_logits().requires_grad_(), bank(initial_loss=4.0)
        one.logits = random_logits(3, seed=1)
        (slope,) = torch.autograd.grad(one.log_factor(logits, LABELS).sum(), logits)
        teacher, student = (one.logits[LABELS] / 2).softmax(-1), (logits.detach() / 2).softmax(-1)
        torch.testing.assert_close(slope, 2 / 4 * (teacher - student))

    def test_a_memorised_task_is_bounded(self):
        one = bank(least_loss=0.05)
        one.logits, one.losses = random_logits(3, seed=1), torch.zeros(2, dtype=torch.float64)
        other = bank(initial_loss=0.05)
        other.logits = one.logits
        torch.testing.assert_close(one.log_factor(random_logits(), LABELS), other.log_factor(random_logits(), LABELS))


class TestBank:
    def test_several_examples_of_a_class_count_by_their_mean(self):
        """E8: not by the last of them."""
        one, logits = bank(momentum=0.75), random_logits()
        one.record(logits, LABELS)
        one.update()
        torch.testing.assert_close(one.logits[0], 0.25 * (logits[0] + logits[4]) / 2)
        torch.testing.assert_close(one.logits[1], 0.25 * logits[1])
        reordered = bank(momentum=0.75)
        reordered.record(logits.flip(0), LABELS.flip(0))
        reordered.update()
        torch.testing.assert_close(reordered.logits, one.logits)

    def test_losses_are_means_of_each_tasks_cross_entropy(self):
        one, logits = bank(loss_momentum=0.9), random_logits()
        one.record(logits, LABELS)
        one.update()
        rows = torch.nn.functional.cross_entropy(logits, LABELS, reduction="none")
        expected = torch.stack([9 + 0.1 * rows[GROUPS[LABELS] == task].mean() for task in range(2)])
        torch.testing.assert_close(one.losses, expected)

    def test_what_a_step_does_not_show_stays(self):
        one = bank()
        one.logits = random_logits(3, seed=1)
        before = one.logits.clone()
        one.record(random_logits(2), torch.tensor([1, 1]))
        one.update()
        assert torch.equal(one.logits[[0, 2]], before[[0, 2]])
        assert float(one.losses[1]) == 10
        one.update()
        assert float(one.losses[1]) == 10

    def test_particles_count_by_their_mean_and_once(self):
        one, two = bank(), bank()
        first, second = random_logits(), random_logits(seed=1)
        for logits in (first, second):
            one.record(logits, LABELS)
        two.record((first + second) / 2, LABELS)
        one.update()
        two.update()
        torch.testing.assert_close(one.logits, two.logits)
        torch.testing.assert_close(one.losses, two.losses)


class TestTraining:
    @pytest.fixture
    def model(self, three_shapes_model, three_shapes):
        task = three_shapes(groups=(("top", 1), ("rest", 2)))
        return three_shapes_model(adapter=[LoRA(rank=2), LastLayer()], task=task)

    def fit(self, model, **settings):
        return MAP(steps=6, learning_rate=0.05, batch_size=6, **settings).fit(model, model.task.train, progress=False)

    def test_weight_zero_is_as_without(self, model):
        """E12a: the same trajectory, to the last bit."""
        plain, zero = self.fit(model), self.fit(model, retaining=QualityRetaining(weight=0.0))
        for name, value in plain.mean().items():
            assert torch.equal(value, zero.mean()[name])
        assert [entry["nll"] for entry in plain.record["history"]] == [entry["nll"] for entry in zero.record["history"]]
        assert all(entry["retained"] == 0 for entry in zero.record["history"])

    def test_the_loss_has_the_factor_of_the_batch(self, model):
        run = MAP(steps=3, batch_size=6, retaining=QualityRetaining()).iterate(model, model.task.train)
        batch = next(model.encode(model.task.train).stream(6, seed=0))
        with torch.no_grad():
            logits = model.row_logits(batch, run.guide.mean())
            retained = -run.bank.log_factor(logits, batch["labels"]).mean()
        stats = next(iter(run))
        assert stats.retained == pytest.approx(float(retained))
        assert stats.loss == pytest.approx(stats.nll + stats.kl + stats.retained)

    def test_the_factor_stands_in_the_plate_of_the_data(self, model):
        one = LogitBank(QualityRetaining(), model.task.format.group_of_class, torch.device("cpu"), torch.float64)
        one.logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        run = MAP(steps=1).iterate(model, model.task.train)
        batch = model.encode(model.task.train).batch([0, 1, 2, 3])
        elbo = AnalyticELBO()
        elbo.loss_and_grads(RetainingMessenger(one)(model.__call__), run.guide, batch)
        with torch.no_grad():
            rows = one.log_factor(model.row_logits(batch, run.guide.mean()), batch["labels"])
        # the mini-batch of four stands for twelve rows
        assert elbo.terms["quality"] == pytest.approx(-3 * float(rows.sum()))

    def test_bank_and_losses_get_no_gradient(self, model):
        """E12b."""
        run = SVI(steps=3, particles=2, retaining=QualityRetaining()).iterate(model, model.task.train)
        for _ in run:
            assert not run.bank.logits.requires_grad
            assert not run.bank.losses.requires_grad
        assert run.bank.logits.abs().max() > 0
        assert run.bank.losses.max() < 10

    def test_it_goes_on_where_it_stopped(self, model, tmp_path):
        engine = MAP(steps=6, batch_size=6, retaining=QualityRetaining(), checkpoint_every=1)
        whole = engine.fit(model, model.task.train, progress=False)
        kept = dataclasses.replace(engine, checkpoint=tmp_path)
        run = kept.iterate(model, model.task.train)
        for stats in run:
            if stats.step == 3:
                break
        again = kept.fit(model, model.task.train, progress=False)
        for name, value in whole.mean().items():
            assert torch.equal(value, again.mean()[name])

    def test_it_changes_where_training_goes(self, model):
        plain, held = self.fit(model), self.fit(model, retaining=QualityRetaining(weight=20.0))
        assert not torch.equal(plain.mean()["head.weight"], held.mean()["head.weight"])

    def test_it_meets_the_router(self, three_shapes_model):
        model = three_shapes_model(adapter=[MoEfiedLoRA(rank=2, experts=4), LastLayer()])
        history = self.fit(model, retaining=QualityRetaining()).record["history"]
        assert all(entry["retained"] >= 0 for entry in history)


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"weight": -1.0}, "must not be negative"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"least_loss": 0.0}, "least_loss must be positive"),
            ({"momentum": 1.0}, r"share in \[0, 1\); got 1\.0"),
            ({"direction": "techer"}, "Did you mean 'teacher'"),
        ],
    )
    def test_settings_out_of_range(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            QualityRetaining(**settings)

    def test_engines_without_logits_and_other_things(self):
        with pytest.raises(ValueError, match="integrates the head out"):
            VBLL(retaining=QualityRetaining())
        with pytest.raises(TypeError, match="retaining is a dict"):
            MAP(retaining={})

    def test_options_are_no_classes(self, three_topics_model):
        from pyrolora.models.tasks import Example, OptionScoring, Split, Task

        examples = tuple(Example({"text": "dog"}, 0, ("sun", "moon"), id=str(row)) for row in range(4))
        splits = {name: Split(name, "options", examples, 2) for name in ("train", "validation", "test")}
        task = Task("options", ("A", "B"), OptionScoring("{text}"), **splits, description="", licence="")
        model = three_topics_model(task=task)
        with pytest.raises(ValueError, match="scores options, which are no classes to retain"):
            MAP(retaining=QualityRetaining()).iterate(model, model.task.train)

    def test_a_declaration_in_a_configuration(self):
        from pyrolora.inference.evaluation.configuration import ExperimentConfig

        config = ExperimentConfig(methods=("map",), settings={"map": {"retaining": "QualityRetaining(weight=2.0)"}})
        assert config.method("map").make_engine().retaining == QualityRetaining(weight=2.0)
