"""MoEfiedLoRA: clusters, router, fading, and what is left of them (specification 3E, E1 to E6 and E9 to E11)."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.func import functional_call, jacrev
from transformers import ViTConfig, ViTModel

from pyrolora.guides import BLoB
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.logit_gradients import LogitGradients, each_logit
from pyrolora.inference.map import MAP
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import Adapter, LastLayer, LoRA, MoEfiedLoRA
from pyrolora.models.adapters.moefied import ExpertGate
from pyrolora.models.clustering import balanced_clusters, reassigned
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.serving import Served, merged
from pyrolora.models.vision.loading import tiny_vit

ADAPTER = MoEfiedLoRA(rank=2, experts=4, temperature=0.5)


def random_draw(model, draws=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = () if draws is None else (draws,)
    return {
        name: torch.randn(*shape, *site.shape, generator=generator, dtype=torch.float64) * 0.5
        for name, site in model.sites.items()
    }


def at(model, fade):
    """A batch of test images at a fade: the default schedule is faded at half of training."""
    batch = model.encode(model.task.test).batch(list(range(9)))
    return {**batch, "progress": torch.tensor(fade / 2, dtype=torch.float64)}


@pytest.fixture
def model(three_shapes_model):
    return three_shapes_model(adapter=[ADAPTER, LastLayer()])


class TestClusters:
    def test_they_are_balanced_and_the_same_each_time(self):
        rows = torch.randn(48, 7, generator=torch.Generator().manual_seed(0))
        found = balanced_clusters(rows, 6)
        assert found.bincount().tolist() == [8] * 6
        assert torch.equal(found, balanced_clusters(rows, 6))
        # directions alone count
        assert torch.equal(found, balanced_clusters(rows * torch.rand(48, 1).add(0.1), 6))

    def test_groups_that_are_there_are_found(self):
        generator = torch.Generator().manual_seed(0)
        centres = torch.linalg.qr(torch.randn(10, 4, generator=generator))[0].T
        true = torch.arange(4).repeat(6)
        rows = centres[true] + 0.05 * torch.randn(24, 10, generator=generator)
        found = balanced_clusters(rows, 4)
        assert all(len(set(found[true == group].tolist())) == 1 for group in range(4))

    def test_the_assignment_is_no_worse_than_any_swap(self):
        rows = torch.nn.functional.normalize(
            torch.randn(24, 5, generator=torch.Generator().manual_seed(1)).double(), dim=1
        )
        found = balanced_clusters(rows, 3)
        centroids = torch.stack([rows[found == cluster].mean(0) for cluster in range(3)])
        gain = rows @ centroids.T
        own = gain.gather(1, found[:, None])
        swapped = gain[:, found] + gain[:, found].T
        assert (swapped <= own + own.T + 1e-12).all()

    @pytest.mark.parametrize("seed", range(8))
    def test_moving_in_cycles_is_as_good_as_solving_anew(self, seed):
        chance = np.random.default_rng(seed)
        clusters, size = int(chance.integers(2, 9)), int(chance.integers(1, 12))
        cost, start = chance.normal(size=(clusters * size, clusters)), np.repeat(np.arange(clusters), size)
        found = reassigned(cost, start)
        _, seats = linear_sum_assignment(np.repeat(cost, size, axis=1))
        assert np.bincount(found).tolist() == [size] * clusters
        rows = np.arange(len(cost))
        assert cost[rows, found].sum() == pytest.approx(cost[rows, seats // size].sum(), abs=1e-9)
        assert np.array_equal(reassigned(cost, found), found)

    def test_clusters_that_do_not_divide(self):
        with pytest.raises(ValueError, match="5 clusters do not divide 48 rows; choose one of 1, 2, 3, 4, 6"):
            balanced_clusters(torch.randn(48, 7), 5)

    def test_experts_are_of_lower_rank_than_chunks(self, tiny_vision):
        """E11: the share of the three largest singular values of an expert's rows."""
        weight = tiny_vision(intermediate_size=96).network.layers[0].mlp.fc1.weight.double()

        def concentration(groups):
            values = [torch.linalg.svdvals(weight[groups == group]) for group in range(8)]
            return torch.stack([one[:3].sum() / one.sum() for one in values]).mean()

        assert concentration(balanced_clusters(weight, 8)) > concentration(torch.arange(96) // 12) + 0.01


class TestRouter:
    def test_a_permutation_keeps_the_function_and_makes_experts_slices(self, tiny_vision):
        """E1: with channels sorted by expert the feed-forward layer is the same, and an expert is one slice of it."""
        mlp = tiny_vision(torch.float64).network.layers[0].mlp
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
        expert = balanced_clusters(mlp.fc1.weight, 4)
        order = expert.argsort(stable=True)
        up, bias, down = mlp.fc1.weight[order], mlp.fc1.bias[order], mlp.fc2.weight[:, order]
        hidden = rows @ up.T + bias
        permuted = mlp.activation_fn(hidden) @ down.T + mlp.fc2.bias
        torch.testing.assert_close(permuted, mlp(rows), rtol=0, atol=1e-12)
        gate = ExpertGate(torch.randn(4, 16, generator=generator, dtype=torch.float64), expert, 0.5, 0.0, 0)
        by_slices = hidden.unflatten(-1, (4, 8)) * gate.weights(rows)[..., None]
        torch.testing.assert_close(gate(rows, mlp.fc1(rows))[..., order], by_slices.flatten(-2), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("fade", [0.0, 0.3, 1.0])
    def test_weights_add_up_to_the_number_of_experts(self, fade):
        """E3."""
        generator = torch.Generator().manual_seed(0)
        gate = ExpertGate(torch.randn(4, 16, generator=generator).double(), torch.arange(32) % 4, 0.5, fade, 0)
        weights = gate.weights(torch.randn(3, 5, 16, generator=generator).double())
        assert weights.std(-1).max() > 0.5 or fade > 0
        torch.testing.assert_close(weights.sum(-1), torch.full((3, 5), 4.0).double(), rtol=0, atol=1e-12)

    def test_the_model_gates_bias_base_and_change_together(self, model):
        """The oracle is the network by hand, with the weights changed and the gate between the two layers."""
        draw, batch = random_draw(model), at(model, 0.4)
        got = model.row_logits(batch, draw)
        network, expert = model.backbone.network, model.constants["fc1.expert"]
        changed = dict(network.named_parameters())
        with merged(model, draw) as inside:
            changed = {name: value.clone() for name, value in inside.named_parameters()}
        handles = [
            layer.mlp.fc1.register_forward_hook(
                lambda module, args, output, i=i: (
                    output * (1 + 0.6 * (4 * (args[0] @ draw["fc1.router"][i].T / 0.5).softmax(-1) - 1))[..., expert[i]]
                )
            )
            for i, layer in enumerate(network.layers)
        ]
        model.release()
        with torch.no_grad():
            pixels = (batch["pixel_values"].double() - 0.5) / 0.5
            hidden = functional_call(network, changed, (pixels,)).last_hidden_state
        for handle in handles:
            handle.remove()
        # images are normalised in float32 on both sides
        torch.testing.assert_close(got, hidden[:, 0] @ draw["head.weight"].T, rtol=0, atol=1e-6)

    def test_the_start_is_the_network_itself(self, model):
        start = model.initial(torch.Generator().manual_seed(0))
        batch = at(model, 0.0)
        torch.testing.assert_close(model.features(batch, start), model.backbone.features(batch), rtol=0, atol=1e-12)

    def test_draws_on_the_batch_axis_equal_one_by_one(self, model):
        draws, batch = random_draw(model, 3), at(model, 0.2)
        together = model.logits(batch, draws)
        for number in range(3):
            alone = model.row_logits(batch, {name: value[number] for name, value in draws.items()})
            torch.testing.assert_close(together[number], alone)

    @pytest.mark.parametrize("fade", [0.2, 1.0])
    def test_checkpointing_gives_the_same_gradients(self, three_shapes_model, fade):
        found = []
        for checkpointing in (False, True):
            model = three_shapes_model(adapter=[ADAPTER, LastLayer()])
            if checkpointing:
                model.backbone.checkpoint_gradients()
            draw = {name: value.requires_grad_() for name, value in random_draw(model).items()}
            logits = model.row_logits(at(model, fade), draw)
            names = [name for name in draw if fade < 1 or name != "fc1.router"]
            found.append(torch.autograd.grad(logits.logsumexp(-1).sum(), [draw[name] for name in names]))
        for plain, again in zip(*found, strict=True):
            assert plain.abs().max() > 0
            torch.testing.assert_close(plain, again)

    def test_one_a_serves_three_projections(self, model):
        draw, batch = random_draw(model), at(model, 1.0)
        calls = []
        site_linear = "pyrolora.models.adapters.moefied.site_linear"
        with pytest.MonkeyPatch.context() as patch:
            import pyrolora.models.adapters.moefied as module

            plain = module.site_linear
            patch.setattr(
                site_linear, lambda rows, weight, site, entry: calls.append(site) or plain(rows, weight, site, entry)
            )
            model.row_logits(batch, draw)
        assert calls.count("qkv.lora_A") == len(model.backbone.blocks)
        assert calls.count("k_proj.lora_B") == len(model.backbone.blocks)

    def test_one_a_takes_another_tensor_for_what_it_is(self, model):
        draw = random_draw(model)
        deltas, site = model.deltas(draw), model.sites["k_proj.lora_B"]
        first, second = torch.randn(2, 1, 4, 16, dtype=torch.float64)
        deltas[model.sites["q_proj.lora_B"].modules[0]](first)
        expected = second @ draw["qkv.lora_A"][0].T @ draw[site.name][0].T
        torch.testing.assert_close(deltas[site.modules[0]](second), expected)
        # without a graph, and then with one
        down = draw["qkv.lora_A"].requires_grad_()
        deltas = model.deltas(draw)
        with torch.no_grad():
            deltas[model.sites["q_proj.lora_B"].modules[0]](first)
        (slope,) = torch.autograd.grad(deltas[site.modules[0]](first).sum(), down)
        assert slope.abs().max() > 0


class TestFading:
    def gap(self, model, draw, fade):
        batch = at(model, fade)
        with torch.no_grad():
            return float((model.row_logits(batch, draw) - self.plain(model, draw, batch)).abs().max())

    def plain(self, model, draw, batch):
        model.release()
        with merged(model, draw):
            return model.backbone.features(batch) @ draw["head.weight"].T

    def test_the_faded_network_is_the_merged_one(self, model):
        """E2 and its negative control E2b."""
        draw = random_draw(model)
        assert self.gap(model, draw, 1.0) < 1e-12
        assert self.gap(model, draw, 0.0) > 0.05

    def test_the_gap_closes_step_by_step(self, model):
        """E5, for weights as small as training leaves them: a large router may overshoot on the way."""
        draw = {name: value * (1 if name == "head.weight" else 0.3) for name, value in random_draw(model).items()}
        gaps = [self.gap(model, draw, fade) for fade in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 1e-12

    def test_merging_after_a_permutation_and_undoing_it_is_the_same(self, model):
        """E4: nothing was moved, so the merged weights stand in the original order of channels."""
        draw = random_draw(model)
        order = model.constants["fc1.expert"][0].argsort(stable=True)
        base = model.backbone.network.layers[0].mlp
        up, down = (draw[f"{kind}.lora_B"][0] @ draw[f"{kind}.lora_A"][0] for kind in ("fc1", "fc2"))
        with merged(model, draw) as network:
            fc1, fc2 = (layer.weight.clone() for layer in (network.layers[0].mlp.fc1, network.layers[0].mlp.fc2))
        permuted_up = base.fc1.weight[order] + draw["fc1.lora_B"][0][order] @ draw["fc1.lora_A"][0]
        permuted_down = base.fc2.weight[:, order] + draw["fc2.lora_B"][0] @ draw["fc2.lora_A"][0][:, order]
        torch.testing.assert_close(permuted_up[order.argsort()], fc1, rtol=0, atol=1e-12)
        torch.testing.assert_close(permuted_down[:, order.argsort()], fc2, rtol=0, atol=1e-12)
        torch.testing.assert_close(fc1 - base.fc1.weight, up, rtol=0, atol=1e-12)
        torch.testing.assert_close(fc2 - base.fc2.weight, down, rtol=0, atol=1e-12)

    def test_the_schedule_is_linear_and_stays_at_one(self):
        """E9: the released schedule, and one of the user's own."""
        assert [MoEfiedLoRA().fade(progress) for progress in (0, 0.125, 0.25, 0.5, 0.8, 1)] == [0, 0.25, 0.5, 1, 1, 1]
        late = MoEfiedLoRA(fade_start=0.5, fade_end=1.0)
        assert [late.fade(progress) for progress in (0, 0.5, 0.75, 1)] == [0, 0, 0.5, 1]

    def test_training_moves_along_it(self, model):
        steps, seen = 8, []
        bind = model.backbone.bind

        def watched(deltas, gates, **settings):
            seen.append(next(iter(gates.values())).fade if gates else 1.0)
            bind(deltas, gates, **settings)

        model.backbone.bind = watched
        MAP(steps=steps).fit(model, model.task.train, progress=False)
        assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]

    def test_an_unfinished_fit_predicts_with_its_router(self, model):
        run = MAP(steps=8, learning_rate=0.1).iterate(model, model.task.train)
        for stats in run:
            if stats.step == 2:
                early = run.posterior()
        batch = model.encode(model.task.test).batch(list(range(9)))
        assert early.context["progress"] == 0.25
        with torch.no_grad():
            expected = model.row_logits({**batch, "progress": torch.tensor(0.25)}, early.mean()).softmax(-1)
            faded = model.row_logits(batch, early.mean()).softmax(-1)
        got = early.predict(batch).mean_probs
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-6)
        assert (faded.float() - got).abs().max() > 1e-5
        with pytest.raises(ValueError, match="25% through its training, and its router has not faded"):
            Laplace().fit(model, model.task.train, estimate=early, progress=False)
        assert run.posterior().context == {}

    def test_every_kind_of_prediction_takes_an_unfinished_fit(self, model):
        run = SVI(guide=BLoB(), steps=8, learning_rate=0.1).iterate(model, model.task.train)
        # two steps, because B is still zero after one, and logits without variance are no case for the closed forms
        early = next(run.posterior() for stats in run if stats.step == 2)
        assert early.context["progress"] == 0.25
        for kind in early.kinds:
            found = early.predict(model.task.test, draws=2, kind=kind, generator=torch.Generator().manual_seed(0))
            assert found.log_likelihood.isfinite().all()

    def test_bfloat16_runs_with_its_router(self, three_shapes_model):
        model = three_shapes_model(torch.bfloat16, adapter=[ADAPTER, LastLayer()])
        draw = {name: value.float() for name, value in random_draw(model).items()}
        logits = model.row_logits(at(model, 0.2), draw)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_weights_cannot_hold_a_router(self, model):
        draw = random_draw(model)
        with (
            pytest.raises(ValueError, match=r"goes through a gate that reads each token"),
            merged(model, draw, at(model, 0.5)),
        ):
            pass
        assert Served({"one": model}, {"one": draw}).deltas["one"]


class TestSpecialCases:
    @pytest.mark.parametrize("fade", [0.0, 0.5, 1.0])
    def test_one_expert_is_plain_lora(self, three_shapes_model, fade):
        """E10."""
        one = three_shapes_model(adapter=[MoEfiedLoRA(rank=2, experts=1), LastLayer()])
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
        plain = three_shapes_model(adapter=[LoRA(rank=2, alpha=2.0, targets=kinds), LastLayer()])
        assert "fc1.router" not in one.sites
        assert one.context_keys == ()
        draw = random_draw(one)
        same = {name: draw.get(name, draw["qkv.lora_A"]) for name in plain.sites}
        torch.testing.assert_close(one.row_logits(at(one, fade), draw), plain.row_logits(at(plain, 1.0), same))

    def test_the_change_of_fc1_has_the_rank_and_counts_are_the_papers(self, model):
        """E6: one A for all experts, and ViT-B's trainable parameters with a head of 598 classes."""
        draw = random_draw(model)
        change = draw["fc1.lora_B"][0] @ draw["fc1.lora_A"][0]
        assert int(torch.linalg.matrix_rank(change)) == 2
        with torch.device("meta"):
            network = ViTModel(ViTConfig(), add_pooling_layer=False)
        large = SimpleNamespace(network=network, name="ViT-B", blocks=network.layers)
        head = 768 * 598 + 598
        for rank, millions in ((1, 0.7548), (2, 0.9022), (4, 1.1971)):
            count = sum(site.numel for site in MoEfiedLoRA(rank=rank, experts=16).sites(large, 598))
            assert (count + head) / 1e6 == pytest.approx(millions, abs=5e-5)

    @pytest.mark.parametrize("experts", [1, 4])
    def test_curvature_of_the_shared_factor_equals_brute_force(self, three_shapes_model, experts):
        model = three_shapes_model(adapter=[MoEfiedLoRA(rank=2, experts=experts), LastLayer()])
        draw = random_draw(model)
        batch = model.encode(model.task.test).batch([0, 1])
        names = ("qkv.lora_A", "v_proj.lora_B", "fc1.lora_B", "fc2.lora_A", "head.weight")
        _, found = LogitGradients(model, draw, names).jacobians(batch, each_logit)
        for name in names:
            brute = jacrev(lambda value, name=name: model.row_logits(batch, {**draw, name: value}))(draw[name])
            torch.testing.assert_close(found[name].movedim(0, 1), brute)


class TestPosteriors:
    def test_laplace_leaves_the_faded_router_at_the_estimate(self, model):
        posterior = Laplace(structure="kron", estimate=MAP(steps=4)).fit(model, model.task.train, progress=False)
        assert "fc1.router" not in posterior.record["sites"]
        assert "qkv.lora_A" in posterior.record["sites"]
        draws = posterior.sample(3)
        assert draws["fc1.router"].std(0).max() == 0
        assert draws["qkv.lora_A"].std(0).min() > 0
        with pytest.raises(ValueError, match=r"'fc1.router' is not a stack of weights of linear maps"):
            Laplace(sites="*", estimate=MAP(steps=2)).fit(model, model.task.train, progress=False)

    def test_blob_makes_every_a_bayesian(self, model):
        posterior = SVI(guide=BLoB(), steps=3).fit(model, model.task.train, progress=False)
        spread = {name: float(value.std(0).max()) for name, value in posterior.sample(3).items()}
        assert {name for name, value in spread.items() if value > 0} == {
            "qkv.lora_A", "o_proj.lora_A", "fc1.lora_A", "fc2.lora_A"
        }  # fmt: skip

    def test_it_is_saved_and_read_with_its_experts(self, model, tmp_path):
        from pyrolora.inference.posterior import Posterior

        posterior = MAP(steps=2).fit(model, model.task.train, progress=False)
        # other experts, as another machine's rounding could have made them
        other = model.with_constants({"fc1.expert": model.constants["fc1.expert"].roll(1, dims=1)})
        again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "kept"), model=other)
        assert torch.equal(again.model.constants["fc1.expert"], model.constants["fc1.expert"])
        assert Adapter.from_dict(ADAPTER.to_dict()) == ADAPTER

    def test_a_flat_router_learns(self, three_shapes_model):
        model = three_shapes_model(adapter=[dataclasses.replace(ADAPTER, fade_end=1.0), LastLayer()], prior=Flat())
        posterior = MAP(steps=6, learning_rate=0.1).fit(model, model.task.train, progress=False)
        assert posterior.mean()["fc1.router"].abs().max() > 1e-3


def test_experts_are_found_once_for_a_backbone(tiny_vision, three_shapes, monkeypatch):
    from pyrolora.models.program import BayesianModel

    calls, backbone = [], tiny_vision()
    plain = "pyrolora.models.adapters.moefied.balanced_clusters"
    monkeypatch.setattr(plain, lambda rows, clusters: calls.append(clusters) or balanced_clusters(rows, clusters))
    for size in (12, 9):
        BayesianModel(backbone, three_shapes(size), adapter=ADAPTER)
    assert calls == [4, 4]  # two blocks, once
    with torch.no_grad():
        backbone.network.layers[0].mlp.fc1.weight.mul_(2)
    BayesianModel(backbone, three_shapes(), adapter=ADAPTER)
    assert len(calls) == 4


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"rank": 0}, "rank must be at least 1"),
            ({"experts": 0}, "experts must be at least 1"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"fade_start": 0.5, "fade_end": 0.5}, "0 <= start < end <= 1; got 0.5 and 0.5"),
            ({"fade_end": 1.5}, "got 0.0 and 1.5"),
            ({"fade_start": -0.1}, r"got -0\.1 and 0\.5"),
        ],
    )
    def test_settings_out_of_range(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            MoEfiedLoRA(**settings)

    def test_networks_that_do_not_fit(self, tiny_vision, three_topics_model):
        with pytest.raises(ValueError, match="5 experts do not divide the 32 hidden channels of tiny"):
            MoEfiedLoRA(experts=5).sites(tiny_vision(), 3)
        with pytest.raises(ValueError, match="Rank 17 exceeds the smaller side of qkv"):
            MoEfiedLoRA(rank=17, experts=4).sites(tiny_vision(), 3)
        with pytest.raises(ValueError, match="The projection 'fc1' of tiny does not exist"):
            three_topics_model(adapter=MoEfiedLoRA())

    def test_two_routers_of_one_layer(self, three_shapes_model):
        from pyrolora.models.sites import SiteTable

        with pytest.raises(ValueError, match="Two sites are named"):
            three_shapes_model(adapter=[ADAPTER, dataclasses.replace(ADAPTER, experts=2), LastLayer()])
        assert SiteTable  # the message above is its own


def test_a_vit_of_any_size_has_its_projections():
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"} <= {
        name.rsplit(".", 1)[-1] for name, _ in tiny_vit().named_modules()
    }
