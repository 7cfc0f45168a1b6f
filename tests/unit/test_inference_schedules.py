"""Block schedules: rest is bit-exact, the ELBO stays whole, memory is bounded, and the sampler is its own."""

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
from contextlib import nullcontext

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional

from pyrolora.guides import BLoB, FullCovariance, LowRank, MeanField, Point
from pyrolora.guides.base import Guide
from pyrolora.guides.mean_field import NormalFactor
from pyrolora.inference.map import MAP
from pyrolora.inference.optimiser import GuideAdam
from pyrolora.inference.schedules import BlockSchedule, inclusion_probabilities
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.active_entries import ActiveEntries
from pyrolora.models.adapters import S2FT, CorDA, FullRank, LastLayer, LoRA, PiSSA
from pyrolora.models.prior_declarations import Flat, Relative
from pyrolora.models.sites import Site, SiteTable

ADAPTERS = {
    "LoRA": LoRA(rank=2),
    "PiSSA": PiSSA(rank=2),
    "CorDA": CorDA(rank=2),
    "S2FT": S2FT(channels=4),
    "FullRank": FullRank(targets=["q_proj", "down_proj"]),
}
GUIDES = {"Point": Point(), "MeanField": MeanField(), "LowRank": LowRank(rank=2)}


def plan_of(model, seed=0, own_seed=None, **settings):
    return BlockSchedule(seed=own_seed, **settings).plan(model.sites, model.backbone, seed)


def copies(run):
    """Every parameter by (site, name)."""
    return {
        (site, name): parameter.detach().clone()
        for site, factor in run.guide.items()
        for name, parameter in factor.named_parameters()
    }


class TestRest:
    @pytest.mark.parametrize("adapter", ADAPTERS)
    @pytest.mark.parametrize("guide", GUIDES)
    @pytest.mark.parametrize("state", ["drop", "keep"])
    def test_what_rests_stays_bit_for_bit_and_what_is_active_moves(self, three_topics_model, adapter, guide, state):
        model = three_topics_model(torch.float32, adapter=[ADAPTERS[adapter], LastLayer()])
        schedule = BlockSchedule(active=1, every=3, state=state)
        run = TrainingRun(SVI(guide=GUIDES[guide], steps=9, schedule=schedule), model, model.task.train)
        for step in range(9):
            before = copies(run)
            next(run.steps())
            active = run.optimiser.plan.entries(step // 3)
            for (site, name), value in copies(run).items():
                if site == "head.weight":
                    assert not torch.equal(value, before[site, name])
                    continue
                for entry in range(len(value)):
                    same = torch.equal(value[entry], before[site, name][entry])
                    assert same == (entry not in active[site]), (step, site, name, entry)

    @pytest.mark.parametrize("engine", [MAP(steps=6), SVI(guide=BLoB(), steps=6)], ids=["map", "blob"])
    def test_all_blocks_active_is_no_schedule_at_all(self, three_topics_model, engine):
        model = three_topics_model(torch.float32, adapter=LoRA(rank=2))
        scheduled = dataclasses.replace(engine, schedule=BlockSchedule(active=3, every=2, state="keep"))
        posteriors = [e.fit(model, model.task.train, progress=False) for e in (engine, scheduled)]
        for first, second in zip(*(p.guide.parameters() for p in posteriors), strict=True):
            assert torch.equal(first, second)

    def test_every_block_is_trained_over_a_cycle(self, three_topics_model):
        """Elsewhere, blocks that were frozen when the optimiser was built never moved."""
        model = three_topics_model(adapter=FullRank(targets=["q_proj"]), prior=Flat())
        schedule = BlockSchedule(active=1, every=1, sampler="cycle")
        posterior = MAP(steps=3, schedule=schedule).fit(model, model.task.train, progress=False)
        assert (posterior.mean()["q_proj.weight"].abs().amax((1, 2)) > 0).all()
        assert posterior.record["steps_of_blocks"] == {"0": 1, "1": 1, "2": 1}


class TestELBO:
    @pytest.mark.parametrize("noise", ["example", "weight"])
    def test_active_gradients_and_the_reported_loss_are_the_whole_elbos(self, three_topics_model, noise):
        """Resting blocks are sampled, not replaced by their means, and their KL is reported."""
        model = three_topics_model(adapter=PiSSA(rank=2), prior=Relative(0.1))
        found = []
        for schedule in (None, BlockSchedule(active=1, every=5)):
            engine = SVI(guide=MeanField(), steps=5, noise=noise, schedule=schedule)
            run = TrainingRun(engine, model, model.task.train)
            with torch.no_grad():
                for parameter in run.guide.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            stats = next(run.steps())
            gradients = {
                (site, name): p.grad.clone() for site, f in run.guide.items() for name, p in f.named_parameters()
            }
            found.append((stats, gradients))
        (whole, all_gradients), (part, some) = found
        assert (part.loss, part.nll, part.kl) == (whole.loss, whole.nll, whole.kl)
        active = run.optimiser.plan.entries(0)
        for (site, name), gradient in some.items():
            for entry in active[site]:
                torch.testing.assert_close(gradient[entry], all_gradients[site, name][entry], atol=1e-14, rtol=1e-12)

    def test_unbiased_gradients_meet_the_whole_elbos_on_average(self, three_topics_model):
        """Over a cycle every block is active once: the mean of what the optimiser sees is the gradient of everything."""
        model = three_topics_model(adapter=LoRA(rank=2), prior=dist.Normal(0.0, 0.1))
        found = {}
        for update in (None, "unbiased"):
            schedule = BlockSchedule(active=1, every=1, sampler="cycle", update=update) if update else None
            run = TrainingRun(SVI(guide=MeanField(), steps=3, schedule=schedule), model, model.task.train)
            batch = next(run._stream(0))
            totals = [torch.zeros_like(parameter) for parameter in run.optimiser.parameters]
            for step in range(3):
                entries = run.optimiser.activate(step)
                run.optimiser.zero_grad()
                # of step 0 all along, so that the draws are the same
                with run._seeded_step(), nullcontext() if entries is None else ActiveEntries(entries):
                    run._backward(batch)
                run.optimiser.gradients()
                for (position, entry), tensor in run.optimiser._tensors.items():
                    totals[position][... if entry is None else entry] += tensor.grad / 3
            found[update] = totals
        for some, whole in zip(found["unbiased"], found[None], strict=True):
            torch.testing.assert_close(some, whole, atol=1e-6, rtol=1e-4)

    def test_a_switch_does_not_move_the_loss(self, three_topics_model):
        model = three_topics_model(adapter=LoRA(rank=2), prior=dist.Normal(0.0, 0.1))
        engine = SVI(guide=MeanField(), steps=9, learning_rate=1e-12, scale_learning_rate=1e-12)
        scheduled = dataclasses.replace(engine, schedule=BlockSchedule(active=1, every=2))
        losses = [[stats.loss for stats in TrainingRun(e, model, model.task.train)] for e in (engine, scheduled)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-8)

    def test_backward_stops_below_the_lowest_active_block(self, three_topics_model):
        model = three_topics_model(adapter=LoRA(rank=2), prior=dist.Normal(0.0, 0.1))
        schedule = BlockSchedule(active=1, every=1, sampler="cycle")
        run = TrainingRun(SVI(guide=MeanField(), steps=3, schedule=schedule), model, model.task.train)
        for step in range(3):
            asks = {}

            def note(number, asks=asks):
                def hook(module, args, output):
                    asks[number] = (output[0] if isinstance(output, tuple) else output).requires_grad

                return hook

            handles = [block.register_forward_hook(note(number)) for number, block in enumerate(model.backbone.blocks)]
            next(run.steps())
            for handle in handles:
                handle.remove()
            (lowest,) = run.optimiser.plan.active(step)
            assert asks == {number: number >= int(lowest) for number in range(3)}

    def test_gradient_checkpointing_gives_the_same_fit(self, three_topics_model):
        means = []
        for checkpointing in (False, True):
            model = three_topics_model(adapter=PiSSA(rank=2))
            if checkpointing:
                model.backbone.checkpoint_gradients()
            engine = SVI(guide=MeanField(), steps=4, schedule=BlockSchedule(active=1, every=2))
            means.append(engine.fit(model, model.task.train, progress=False).mean())
        for name, value in means[0].items():
            torch.testing.assert_close(value, means[1][name], atol=1e-10, rtol=0)

    def test_block_by_block_it_reaches_the_exact_mean_field_posterior(self):
        """Linear regression: means the posterior's, variances the reciprocals of its precision's diagonal."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 6, generator=generator, dtype=torch.float64) @ (
            torch.eye(6, dtype=torch.float64) + 0.3 * torch.ones(6, 6, dtype=torch.float64)
        )
        y = x @ torch.arange(1.0, 7.0, dtype=torch.float64) + torch.randn(40, generator=generator, dtype=torch.float64)
        precision = torch.eye(6, dtype=torch.float64) + x.mT @ x
        site = Site("w", torch.Size((6, 1, 1)), ("layer", "a", "b"), ("m",) * 6, (), tuple(range(6)))
        factor = NormalFactor(torch.zeros(6, 1, 1, dtype=torch.float64), torch.ones(6, 1, 1, dtype=torch.float64))
        plan = BlockSchedule(active=2, every=10, sampler="cycle").plan(SiteTable([site]), None, 0)
        optimiser = GuideAdam(Guide({"w": factor}), {"loc": 0.05, "scale": 0.05}, plan)
        for step in range(4000):
            optimiser.activate(step)
            optimiser.zero_grad()
            mean, variance = factor.loc.flatten(), factor.scale.flatten().square()
            misfit = (y - x @ mean).square().sum() + (x.square() @ variance).sum()
            (0.5 * (misfit + mean.square().sum() + variance.sum() - variance.log().sum())).backward()
            optimiser.gradients()
            optimiser.step(0.998**step)
        exact = torch.linalg.solve(precision, x.mT @ y)
        torch.testing.assert_close(factor.loc.detach().flatten(), exact, atol=1e-4, rtol=0)
        variance = factor.scale.detach().flatten().square()
        torch.testing.assert_close(variance, precision.diagonal().reciprocal(), atol=0, rtol=1e-3)


class TestAgainstTogglingWeights:
    def test_full_rank_with_kept_state_is_adam_on_weights_that_are_frozen_and_thawed(self, three_topics_model):
        """The published code: gradients on and off for whole layers of the network itself, embeddings always on."""
        model = three_topics_model(adapter=FullRank(), prior=Flat())
        steps, every, rate = 60, 3, 1e-3
        schedule = BlockSchedule(active=1, every=every, state="keep", seed=4)
        engine = MAP(steps=steps, learning_rate=rate, warmup=0.0, schedule=schedule, batch_size=4)
        run = TrainingRun(engine, model, model.task.train)
        plan = run.optimiser.plan
        batches = list(itertools.islice(run.data.stream(4, seed=run.seed), steps))

        network = copy.deepcopy(model.backbone.network)
        linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        adam = torch.optim.AdamW([module.weight for module in linear.values()], weight_decay=0.0)
        for step, batch in enumerate(batches):
            (block,) = plan.active(step // every)
            for name, module in linear.items():
                module.weight.requires_grad_(f".layers.{block}." in name)
            for group in adam.param_groups:
                group["lr"] = rate * run._rate_factor(step)
            adam.zero_grad(set_to_none=True)
            mask = batch["attention_mask"]
            logits = network(
                input_ids=batch["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
            ).logits[:, -1]
            functional.cross_entropy(logits[:, list(model.label_ids)], batch["labels"]).backward()
            adam.step()

        posterior = engine.fit(model, model.task.train, progress=False)
        moved = 0.0
        for name, site in model.sites.items():
            for entry, path in enumerate(site.modules):
                change = linear[path].weight.detach() - model.backbone.network.get_submodule(path).weight
                torch.testing.assert_close(posterior.mean()[name][entry], change, atol=1e-7, rtol=0)
                moved = max(moved, float(change.abs().max()))
        assert moved > 1e-3


class TestMemory:
    def bytes_of(self, three_topics_model, state, steps=12):
        model = three_topics_model(torch.float32, adapter=[FullRank(), LastLayer()], prior=Flat())
        schedule = BlockSchedule(active=1, every=2, sampler="cycle", state=state)
        run = TrainingRun(MAP(steps=steps, schedule=schedule), model, model.task.train)
        sizes = []
        for _ in run.steps():
            sizes.append(run.optimiser.state_bytes())
        block = sum(site.numel // 3 for site in model.sites.values() if site.layers)
        return sizes, 8 * block, 8 * model.sites["head.weight"].numel, run

    def test_dropped_state_is_never_more_than_the_active_block_and_what_is_always_on(self, three_topics_model):
        sizes, block, head, run = self.bytes_of(three_topics_model, "drop")
        assert set(sizes) == {block + head}
        assert run.posterior().record["peak_optimiser_bytes"] == block + head

    def test_kept_state_grows_to_the_whole_model(self, three_topics_model):
        sizes, block, head, _ = self.bytes_of(three_topics_model, "keep")
        assert sizes[0] == block + head
        assert sizes[-1] == 3 * block + head

    def test_offloaded_state_is_kept_elsewhere(self, three_topics_model):
        sizes, block, head, run = self.bytes_of(three_topics_model, "offload")
        assert set(sizes) == {block + head}
        kept = self.bytes_of(three_topics_model, "keep")[3]
        for first, second in zip(run.guide.parameters(), kept.guide.parameters(), strict=True):
            assert torch.equal(first, second)

    def test_dropping_starts_adam_anew(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=FullRank(targets=["q_proj"]), prior=Flat())
        fits = {}
        for state in ("drop", "keep"):
            schedule = BlockSchedule(active=1, every=2, sampler="cycle", state=state)
            fits[state] = MAP(steps=12, schedule=schedule).fit(model, model.task.train, progress=False).mean()
        assert not torch.equal(fits["drop"]["q_proj.weight"], fits["keep"]["q_proj.weight"])


class TestResuming:
    @pytest.mark.parametrize("state", ["drop", "keep", "offload"])
    @pytest.mark.parametrize("stop", [3, 4, 5])
    def test_in_mid_interval_and_at_a_switch_it_ends_where_an_uninterrupted_fit_does(
        self, three_topics_model, tmp_path, state, stop
    ):
        model = three_topics_model(torch.float32, adapter=PiSSA(rank=2))

        def engine(folder):
            # two cycles, so that a block comes back whose moments were dropped before the interruption
            schedule = BlockSchedule(active=1, every=2, sampler="cycle", state=state)
            return SVI(guide=MeanField(), steps=12, schedule=schedule, checkpoint=folder, checkpoint_every=1)

        whole = engine(tmp_path / "whole").fit(model, model.task.train, progress=False)
        run = TrainingRun(engine(tmp_path / "part"), model, model.task.train)
        steps = run.steps()
        for _ in range(stop):
            next(steps)
        steps.close()
        del run
        resumed = engine(tmp_path / "part").fit(model, model.task.train, progress=False)
        assert resumed.record["steps_done"] == 12
        for first, second in zip(whole.guide.parameters(), resumed.guide.parameters(), strict=True):
            assert torch.equal(first, second)

    def test_another_schedule_is_another_fit(self, three_topics_model, tmp_path):
        model = three_topics_model(adapter=LoRA(rank=2))
        folder = tmp_path / "state"
        MAP(steps=2, schedule=BlockSchedule(active=1), checkpoint=folder, checkpoint_every=1).fit(
            model, model.task.train, progress=False
        )
        with pytest.raises(ValueError, match=r"settings.schedule.active was 1 and is now 2"):
            MAP(steps=2, schedule=BlockSchedule(active=2), checkpoint=folder).fit(model, model.task.train)


class TestSampler:
    @pytest.fixture
    def model(self, three_topics_model, tiny_llama, tiny_tokenizer, three_topics):
        from pyrolora.models.backbones import Backbone
        from pyrolora.models.program import BayesianModel

        backbone = Backbone(tiny_llama(num_hidden_layers=10), tiny_tokenizer, "ten")
        return BayesianModel(backbone, three_topics(), LoRA(rank=1))

    @pytest.mark.parametrize("sampler", ["uniform", "cycle", "norm"])
    def test_exactly_as_many_as_declared_and_no_global_state(self, model, sampler):
        plan = plan_of(model, active=3, sampler=sampler)
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = [plan.active(k) for k in range(50)]
        assert torch.equal(before, torch.get_rng_state())
        assert all(len(set(chosen)) == 3 for chosen in first)
        torch.manual_seed(2)
        # in any order, so that nothing depends on what was drawn before
        assert [plan.active(k) for k in reversed(range(50))] == first[::-1]
        assert first != [plan_of(model, seed=1, active=3, sampler=sampler).active(k) for k in range(50)]
        fixed = plan_of(model, seed=1, active=3, sampler=sampler, own_seed=0)
        assert [fixed.active(k) for k in range(50)] == first

    def test_uniform_is_uniform(self, model):
        counts = dict.fromkeys(range(10), 0)
        plan = plan_of(model, active=2)
        for interval in range(2000):
            for name in plan.active(interval):
                counts[int(name)] += 1
        # without replacement: variance 2000 * 0.2 * 0.8 a block, 9 degrees of freedom; 10^-6 quantile of chi-square 46
        statistic = sum((count - 400) ** 2 / (2000 * 0.2 * 0.8) for count in counts.values()) * 9 / 10
        assert statistic < 46

    @pytest.mark.parametrize("active", [1, 2, 3, 4, 7])
    def test_a_cycle_covers_every_block_in_the_fewest_intervals(self, model, active):
        plan, chunks = plan_of(model, active=active, sampler="cycle"), -(-10 // active)
        orders = []
        for cycle in range(4):
            seen = [name for k in range(chunks) for name in plan.active(cycle * chunks + k)]
            assert set(seen) == {str(layer) for layer in range(10)}
            orders.append(tuple(seen))
        assert len(set(orders)) > 1

    def test_norm_prefers_blocks_with_large_weights(self, model):
        for layer, block in enumerate(model.backbone.blocks):
            for kind in ("q_proj", "v_proj"):
                block.self_attn.get_submodule(kind).weight.data.fill_(1.0 if layer == 7 else 0.25)
        plan = plan_of(model, active=1, sampler="norm")
        share = sum(plan.active(k) == ("7",) for k in range(2000)) / 2000
        # expected 4 / 13; five standard errors are 0.052
        assert share == pytest.approx(4 / 13, abs=0.052)

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_inclusion_probabilities_are_those_of_all_orders(self, count):
        weights = torch.tensor([0.1, 1.0, 2.0, 5.0, 0.7], dtype=torch.float64)
        expected = torch.zeros(5, dtype=torch.float64)
        for order in itertools.permutations(range(5), count):
            left, chance = float(weights.sum()), 1.0
            for item in order:
                chance, left = chance * float(weights[item]) / left, left - float(weights[item])
            expected[list(order)] += chance
        found = inclusion_probabilities(weights, count)
        assert (found - expected).abs().max() < 1e-6
        assert float(found.sum()) == pytest.approx(count, abs=1e-6)

    def test_factors_are_inverse_probabilities_of_active_blocks_alone(self, model):
        assert plan_of(model, active=2).gradient_factors() == {}
        uniform = plan_of(model, active=2, update="unbiased").gradient_factors()
        assert uniform["q_proj.lora_A"] == dict.fromkeys(range(10), 5.0)
        norm = plan_of(model, active=2, sampler="norm", update="unbiased")
        chances = norm.probabilities()
        assert norm.gradient_factors()["v_proj.lora_B"][3] == pytest.approx(1 / chances["3"])
        drawn = torch.tensor([[float(name in norm.active(k)) for name in chances] for k in range(2000)]).mean(0)
        # standard errors below 0.011; five of them for ten blocks, 1 run in 10^5
        assert (drawn - torch.tensor(list(chances.values()))).abs().max() < 0.055

    def test_another_process_draws_the_same(self, model):
        plan = plan_of(model, active=2, seed=3)
        code = (
            "import json, torch\nfrom pyrolora.inference.schedules import BlockSchedule\n"
            "from pyrolora.models.sites import Site, SiteTable\n"
            "torch.manual_seed(99)\n"
            "s = SiteTable([Site('w', torch.Size((10, 1, 1)), ('layer', 'a', 'b'), ('m',) * 10, (), tuple(range(10)))])\n"
            "p = BlockSchedule(active=2).plan(s, None, 3)\nprint(json.dumps([p.active(k) for k in range(20)]))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert [tuple(names) for names in json.loads(out)] == [plan.active(k) for k in range(20)]

    def test_blocks_by_pattern(self, model):
        plan = plan_of(model, blocks=("[0-4].*", "[5-9].q_proj.*"), always=("v_proj.*",), active=1)
        assert {name: set(entries) for name, entries in plan.blocks.items()} == {
            "[0-4].*": {"q_proj.lora_A", "q_proj.lora_B"},
            "[5-9].q_proj.*": {"q_proj.lora_A", "q_proj.lora_B"},
        }
        assert plan.blocks["[5-9].q_proj.*"]["q_proj.lora_A"] == frozenset(range(5, 10))
        assert plan.visits(41) == {name: sum(plan.active(k) == (name,) for k in (0, 1)) * 20 + (plan.active(2) == (name,))
                                   for name in plan.blocks}  # fmt: skip

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"active": 0}, "active must be at least 1; got 0"),
            ({"active": 11}, "11 blocks are to be active, and the model has 10"),
            ({"every": 0}, "every must be at least 1; got 0"),
            ({"sampler": "unifrom"}, "Unknown sampler 'unifrom'. Did you mean 'uniform'"),
            ({"state": "of"}, "Unknown state 'of'"),
            ({"update": "unbaised"}, "Unknown update 'unbaised'. Did you mean 'unbiased'"),
            ({"always": ("heads.*",)}, "'heads.*' of sites that are always trained matches none. Did you mean"),
            ({"blocks": ("0.*", "[1-9].q*")}, "'1.v_proj.lora_A' belongs to no block"),
            ({"blocks": ("?.*", "0.*")}, "'0.q_proj.lora_A' belongs to the blocks '?.*' and '0.*'"),
            ({"blocks": ("?.*", "11.*")}, "The block '11.*' holds no site"),
        ],
    )
    def test_refusals(self, model, settings, message):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
            plan_of(model, **settings)
        assert message in str(refused.value)


def test_a_posterior_that_ties_layers_together_is_refused(three_topics_model):
    model = three_topics_model(adapter=LoRA(rank=1, targets=["v_proj"]))
    with pytest.raises(ValueError, match=r"independent from layer to layer; that of 'v_proj.lora_A'"):
        SVI(guide=FullCovariance(), schedule=BlockSchedule(active=1)).fit(model, model.task.train)


def test_a_schedule_is_a_block_schedule():
    with pytest.raises(TypeError, match="The schedule is a str"):
        MAP(schedule="lisa")


@pytest.mark.parametrize("noise", ["token", "flipout"])
def test_noise_for_every_token_is_refused_with_a_schedule(noise):
    with pytest.raises(ValueError, match=f"noise='{noise}' draws no weights, so a schedule has none"):
        SVI(noise=noise, schedule=BlockSchedule())
    assert SVI(noise=noise).noise == noise
