"""The optimisation loop: oracles, history, schedule, settings, failures."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from pyrolora.guides import BLoB, LowRank, MeanField, Point
from pyrolora.inference.map import MAP
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.prior_declarations import Flat, learned
from pyrolora.models.tasks import Split

STEPS = 6


def split_of(model, classes):
    examples = tuple(example for example in model.task.train if example.label in classes)
    return Split("train", "three_topics", examples, 3)


class TestAgainstATorchLoop:
    """Weights merged into the network by hand, full logits, cross-entropy, torch's Adam and LambdaLR."""

    RATE, WARMUP, BATCH, SCALE = 1e-2, 0.5, 5, 0.3

    def loop(self, model, start, weight_decay):
        network, train = model.backbone.network, model.encode(model.task.train)
        label_ids = torch.tensor(train.label_ids)
        frozen = {name: value.detach() for name, value in network.state_dict().items()}
        weights = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimiser = torch.optim.Adam(weights.values(), lr=self.RATE)
        rising = round(self.WARMUP * STEPS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: (s + 1) / rising if s < rising else (STEPS - s) / (STEPS - rising)
        )
        stream = train.stream(self.BATCH, seed=0)
        for _ in range(STEPS):
            batch = next(stream)
            merged = dict(frozen)
            for kind in ("q_proj", "v_proj"):
                for place, path in enumerate(model.sites[f"{kind}.lora_A"].modules):
                    change = weights[f"{kind}.lora_B"][place] @ weights[f"{kind}.lora_A"][place]
                    # alpha 4 over rank 2
                    merged[f"{path}.weight"] = frozen[f"{path}.weight"] + 2.0 * change
            mask = batch["attention_mask"]
            inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            logits = functional_call(network, merged, (batch["input_ids"],), inputs).logits[:, -1, label_ids]
            penalty = sum(value.square().sum() for value in weights.values()) * weight_decay / 2
            optimiser.zero_grad()
            (functional.cross_entropy(logits, batch["labels"]) + penalty / len(train)).backward()
            optimiser.step()
            schedule.step()
        return {name: value.detach() for name, value in weights.items()}

    @pytest.mark.parametrize("prior", [Flat(), dist.Normal(0.0, SCALE)], ids=["flat", "normal"])
    def test_map_ends_where_the_loop_ends(self, three_topics_model, prior):
        model = three_topics_model(prior=prior)
        start = {name: 0.3 * torch.randn(site.shape).double() for name, site in model.sites.items()}
        engine = MAP(steps=STEPS, batch_size=self.BATCH, learning_rate=self.RATE, warmup=self.WARMUP)
        found = engine.fit(model, model.task.train, progress=False, start=start).mean()
        weight_decay = 0.0 if isinstance(prior, Flat) else self.SCALE**-2
        expected = self.loop(model, start, weight_decay)
        for name in start:
            moved = (found[name] - start[name]).abs().max()
            assert moved > self.RATE
            # norms inside the network are float32, and Adam divides small gradients by themselves
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-3 * float(moved))


class TestHistory:
    @pytest.mark.parametrize("particles", [1, 3])
    @pytest.mark.parametrize("kl_weight", [1.0, 0.1])
    @pytest.mark.parametrize("guide", [BLoB(), MeanField(), Point()], ids=str)
    def test_loss_is_nll_plus_weighted_kl(self, three_topics_model, guide, kl_weight, particles):
        model = three_topics_model()
        engine = SVI(guide=guide, steps=3, kl_weight=kl_weight, particles=particles)
        history = engine.fit(model, model.task.train, progress=False).record["history"]
        assert [stats["step"] for stats in history] == [1, 2, 3]
        for stats in history:
            assert stats["loss"] == pytest.approx(stats["nll"] + kl_weight * stats["kl"], rel=1e-6)
            assert stats["grad_norm"] > 0

    def test_the_same_seed_gives_the_same_fit_and_another_seed_another(self, three_topics_model):
        model = three_topics_model(prior=learned(0.1, after=0.0))
        fits = [SVI(steps=3, seed=seed).fit(model, model.task.train, progress=False) for seed in (0, 0, 1)]
        assert fits[0].record["history"] == fits[1].record["history"] != fits[2].record["history"]

    def test_a_generator_replaces_the_seed(self, three_topics_model):
        model = three_topics_model()
        fits = [
            SVI(steps=2, seed=seed).fit(
                model, model.task.train, progress=False, generator=torch.Generator().manual_seed(3)
            )
            for seed in (0, 1)
        ]
        assert fits[0].record["history"] == fits[1].record["history"]
        assert fits[0].record["seed"] == fits[1].record["seed"]

    def test_a_posterior_taken_on_the_way_stays_as_it_was(self, three_topics_model):
        model = three_topics_model()
        run = TrainingRun(SVI(steps=2), model, model.task.train)
        steps = run.steps()
        next(steps)
        early = run.posterior()
        kept = {name: value.clone() for name, value in early.mean().items()}
        next(steps)
        assert all(torch.equal(value, kept[name]) for name, value in early.mean().items())
        assert not torch.equal(run.guide.mean()["q_proj.lora_A"], kept["q_proj.lora_A"])

    def test_the_rates_rise_and_end_near_zero(self, three_topics_model):
        model = three_topics_model()
        run = TrainingRun(
            SVI(steps=20, warmup=0.2, learning_rate=1e-3, scale_learning_rate=2e-2), model, model.task.train
        )
        rates = [[group["lr"] for group in run.optimiser.adam.param_groups] for _ in run.steps()]
        loc, scale, point = map(list, zip(*rates, strict=True))
        assert loc[3] == max(loc) == pytest.approx(1e-3)
        assert loc[0] == pytest.approx(1e-3 / 4)
        assert loc[-1] == pytest.approx(1e-3 / 16)
        assert scale == pytest.approx([20 * rate for rate in loc])
        assert point == loc

    def test_clipping_limits_the_step_but_not_the_record(self, three_topics_model):
        model = three_topics_model()
        free, clipped = (
            TrainingRun(MAP(steps=1, max_grad_norm=norm), model, model.task.train) for norm in (None, 1e-3)
        )
        norms = [next(run.steps()).grad_norm for run in (free, clipped)]
        assert norms[0] == norms[1] > 1e-3
        left = torch.cat([parameter.grad.flatten() for parameter in clipped.optimiser.parameters]).norm()
        assert float(left) == pytest.approx(1e-3, rel=1e-3)


class TestTheUsersState:
    def ard(self, site):
        scale = pyro.sample(f"{site.name}.scale", dist.HalfNormal(0.2).expand([site.shape[-1]]).to_event(1))
        return dist.Normal(0.0, scale)

    @pytest.mark.parametrize("prior", ["ard", "learned beside ard"])
    @pytest.mark.parametrize("guide", [MeanField(), BLoB()], ids=str)
    def test_global_random_state_and_param_store_are_left_alone(self, three_topics_model, prior, guide):
        torch.manual_seed(11)
        before = torch.get_rng_state()
        prior = self.ard if prior == "ard" else {"*.lora_A": self.ard, "*.lora_B": learned(0.1, after=0.0)}
        model = three_topics_model(prior=prior)
        SVI(guide=guide, steps=2).fit(model, model.task.train, progress=False)
        assert torch.equal(before, torch.get_rng_state())
        assert list(pyro.get_param_store().keys()) == []

    def test_the_global_random_state_does_not_change_the_fit(self, three_topics_model):
        model = three_topics_model(prior=self.ard)
        fits = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            fits.append(SVI(guide=MeanField(), steps=2).fit(model, model.task.train, progress=False))
        assert fits[0].record["history"] == fits[1].record["history"]

    def test_no_draw_stays_bound_and_no_weight_changes(self, three_topics_model):
        model = three_topics_model()
        before = {name: value.clone() for name, value in model.backbone.network.state_dict().items()}
        SVI(steps=2).fit(model, model.task.train, progress=False)
        assert model.backbone._deltas == {}
        assert all(torch.equal(value, before[name]) for name, value in model.backbone.network.state_dict().items())

    def test_a_learned_scale_moves_late_and_starts_anew_in_the_next_fit(self, three_topics_model):
        model = three_topics_model(prior=learned(0.1, after=0.5))
        run = TrainingRun(SVI(guide=MeanField(), steps=4, scale_learning_rate=0.5), model, model.task.train)
        seen = [float(model.prior.scales["q_proj.lora_A"]) for _ in run.steps()]
        assert seen[0] == pytest.approx(0.1)
        assert seen[1] != pytest.approx(0.1, rel=1e-4)
        TrainingRun(SVI(guide=MeanField(), steps=4), model, model.task.train)
        assert float(model.prior.scales["q_proj.lora_A"]) == pytest.approx(0.1)


class TestOnlyTheLastLayer:
    def test_the_blocks_run_once_for_each_example_however_many_steps(self, three_topics_model):
        model = three_topics_model(adapter=LastLayer(), prior=dist.Normal(0.0, 0.1))
        counts, rows = [], []
        model.backbone.blocks[-1].register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        for steps in (1, 4, 12):  # the first fit also looks at how the network is built
            rows.clear()
            SVI(guide=MeanField(), steps=steps, batch_size=5).fit(model, model.task.train, progress=False)
            counts.append(sum(rows))
        assert counts[2] <= len(model.task.train) + 5 < 12 * 5


class TestTwoFitsOfOneModel:
    def test_a_posterior_keeps_the_learned_scales_of_its_own_fit(self, three_topics_model):
        model = three_topics_model(prior=learned(0.05, after=0.0))
        first = MAP(steps=STEPS).fit(model, model.task.train, progress=False)
        kept = {name: scale.clone() for name, scale in first.model.prior.scales.items()}
        assert all(float(scale) != 0.05 for scale in kept.values())
        MAP(steps=STEPS, learning_rate=0.1).fit(model, model.task.train, progress=False)
        assert all(torch.equal(first.model.prior.scales[name], scale) for name, scale in kept.items())
        assert not any(torch.equal(model.prior.scales[name], scale) for name, scale in kept.items())

    def test_a_posterior_without_learned_scales_keeps_the_model_itself(self, three_topics_model):
        model = three_topics_model(prior=dist.Normal(0.0, 0.1))
        assert MAP(steps=1).fit(model, model.task.train, progress=False).model is model


class TestRefusals:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("steps", 0), ("batch_size", 0), ("particles", 0), ("checkpoint_every", 0),
            ("learning_rate", 0.0), ("learning_rate", math.nan), ("scale_learning_rate", -1.0), ("kl_weight", 0.0),
            ("warmup", 1.0), ("warmup", -0.1), ("noise", "exmaple"), ("max_grad_norm", 0.0), ("max_grad_norm", -1.0),
        ],
    )  # fmt: skip
    def test_a_setting_out_of_range_names_itself(self, setting, value):
        with pytest.raises(ValueError, match=f"({setting}|'example')"):
            SVI(**{setting: value})

    def test_a_class_for_a_guide_is_refused_at_construction(self):
        with pytest.raises(TypeError, match="class BLoB"):
            SVI(guide=BLoB)

    def test_map_refuses_a_guide_that_is_no_point(self):
        with pytest.raises(ValueError, match="MAP fits points"):
            MAP(guide={"*.lora_A": LowRank(), "*.lora_B": Point()})

    @pytest.mark.parametrize(("classes", "named"), [((), "no examples"), ((1,), "one class only")])
    def test_data_that_teach_nothing_are_refused(self, three_topics_model, classes, named):
        model = three_topics_model()
        with pytest.raises(ValueError, match=named):
            SVI(steps=1).fit(model, split_of(model, classes), progress=False)

    def test_a_gap_in_the_guide_is_refused_before_the_first_step(self, three_topics_model):
        model = three_topics_model(adapter=[LoRA(rank=2), LastLayer()])
        with pytest.raises(ValueError, match=r"head\.weight"):
            SVI(guide={"*.lora_?": BLoB()}, steps=1).fit(model, model.task.train, progress=False)


@pytest.mark.parametrize(("average", "count"), [(0.5, 3), (0.1, 1), (0.99, 6)])
def test_the_last_iterates_are_averaged(three_topics_model, average, count):
    engine = MAP(steps=STEPS, batch_size=5, average=average)
    model = three_topics_model()
    iterates, run = [], engine.iterate(model, model.task.train)
    for _ in run:
        iterates.append({name: value.clone() for name, value in run.guide.mean().items()})
    found = run.posterior().mean()
    for name, last in iterates[-1].items():
        wanted = torch.stack([iterate[name] for iterate in iterates[-count:]]).mean(0)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-14)
        assert count == 1 or not torch.equal(found[name], last)
        assert torch.equal(run.guide.mean()[name], last), "the run itself goes on from the last iterate"


@pytest.mark.parametrize("average", [-0.1, 1.0])
def test_an_average_out_of_range_is_refused(average):
    with pytest.raises(ValueError, match=r"average is a fraction of the steps in \[0, 1\)"):
        MAP(average=average)


def test_a_width_under_a_flat_prior_is_remarked_on(three_topics_model, caplog):
    model = three_topics_model(prior={"*.lora_A": dist.Normal(0.0, 0.1), "*.lora_B": Flat()})
    with caplog.at_level(logging.WARNING, logger="pyrolora"):
        SVI(guide=BLoB()).iterate(model, model.task.train)
        assert not caplog.records
        SVI(guide=MeanField()).iterate(model, model.task.train)
    assert [record.args for record in caplog.records] == [("q_proj.lora_B",), ("v_proj.lora_B",)]
