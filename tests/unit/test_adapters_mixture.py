"""The gated low-rank change and the mixture of experts, against dense formulas, peft and Pyro's own enumeration."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyrolora.guides import BLoB, MeanField, Point, build_guide
from pyrolora.guides.base import SeededBy
from pyrolora.inference.evaluation.gold import compare_to_gold
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.links import LINKS
from pyrolora.inference.map import MAP
from pyrolora.inference.nuts import NUTS
from pyrolora.inference.posterior import LINEARISED, Posterior
from pyrolora.inference.predictive import logits_of_draws
from pyrolora.inference.spectrum import change_spectra
from pyrolora.inference.svi import SVI
from pyrolora.inference.vbll import VBLL
from pyrolora.models.adapters import LastLayer, LoRA, MixtureLoRA
from pyrolora.models.adapters.gated import LowRankDelta, over_rank
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel
from pyrolora.models.serving import merged
from pyrolora.models.tasks import Example, Split, episodic

RANK, ALPHA, K, D = 4, 6.0, 2, 5
WORDS = ["red", "green", "river", "house", "sun", "snow", "fire"]
PATH = "model.layers.1.self_attn.q_proj"
IDS = torch.tensor([[5, 9, 23, 4], [7, 7, 30, 11], [12, 3, 8, 40]])


def adapter_of(**settings):
    settings = {"rank": RANK, "alpha": ALPHA, "experts": K, "gate_features": D, "layers": (1, 2), **settings}
    return MixtureLoRA(**settings)


def batch_of(rows=3):
    sequence = torch.randn(rows, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"input_ids": IDS[:rows], "attention_mask": torch.ones_like(IDS[:rows]), "sequence": sequence}


def draws_of(model, *draws, scale=0.3):
    shapes = {name: site.shape for name, site in model.sites.items()}
    return {name: scale * torch.randn(*draws, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def gate_of(draw, batch):
    rows = torch.nn.functional.layer_norm(batch["sequence"], (D,))
    return (rows @ draw["gate.weight"].T).softmax(-1)


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(adapter=adapter_of())


@pytest.fixture
def make(three_topics_model):
    return lambda **settings: three_topics_model(adapter=adapter_of(**settings))


def with_uniform_gate(draw):
    return {**draw, "gate.weight": torch.zeros_like(draw["gate.weight"])}


class TestTheGatedChange:
    """The primitive on matrices, in float64."""

    def matrices(self):
        return torch.randn(RANK, 7, dtype=torch.float64), torch.randn(6, RANK, dtype=torch.float64)

    def test_three_ways_to_write_a_mixture(self):
        (a, b), rows = self.matrices(), torch.randn(3, 4, 7, dtype=torch.float64)
        weights = torch.rand(3, K, dtype=torch.float64)
        got = LowRankDelta(a, b, 1.5, "a", "b", 0, over_rank(weights, RANK))(rows)
        size = RANK // K
        for row, gate in enumerate(weights):
            experts = [b[:, k * size : (k + 1) * size] @ a[k * size : (k + 1) * size] for k in range(K)]
            change = 1.5 * sum(w * expert for w, expert in zip(gate, experts, strict=True))
            torch.testing.assert_close(got[row], rows[row] @ change.T, atol=1e-13, rtol=0)
            spread = 1.5 * b @ torch.diag(gate.repeat_interleave(size)) @ a
            torch.testing.assert_close(got[row], rows[row] @ spread.T, atol=1e-13, rtol=0)

    def test_gates_of_one_vector_of_runs_and_of_tokens(self):
        (a, b), rows = self.matrices(), torch.randn(4, 3, 7, dtype=torch.float64)
        one = torch.rand(RANK, dtype=torch.float64)
        plain = LowRankDelta(a, b, 1.0, "a", "b", 0, one)(rows)
        for gate in (one.expand(2, -1), one.expand(4, -1), one.expand(4, 3, -1), one.expand(2, 3, -1)):
            torch.testing.assert_close(LowRankDelta(a, b, 1.0, "a", "b", 0, gate)(rows), plain, atol=0, rtol=0)
        runs = torch.stack([one, 2 * one])
        doubled = LowRankDelta(a, b, 1.0, "a", "b", 0, runs)(rows)
        torch.testing.assert_close(doubled[:2], plain[:2], atol=0, rtol=0)
        torch.testing.assert_close(doubled[2:], 2 * plain[2:], atol=1e-13, rtol=0)

    def test_gates_for_other_rows_are_refused(self):
        (a, b), rows = self.matrices(), torch.randn(4, 3, 7, dtype=torch.float64)
        with pytest.raises(ValueError, match="gates for 3 rows, and the forward has 4"):
            LowRankDelta(a, b, 1.0, "a", "b", 0, torch.rand(3, RANK))(rows)
        with pytest.raises(ValueError, match="3 members do not divide the rank 4"):
            over_rank(torch.rand(3), RANK)


class TestAgainstPlainLoRA:
    @pytest.mark.parametrize(("variant", "alpha"), [("code", ALPHA), ("paper", ALPHA / K)])
    def test_equal_weights_are_plain_lora(self, three_topics_model, variant, alpha):
        mixture = three_topics_model(adapter=adapter_of(variant=variant))
        plain = three_topics_model(adapter=LoRA(rank=RANK, alpha=alpha, layers=(1, 2)))
        draw = with_uniform_gate(draws_of(mixture))
        torch.testing.assert_close(
            mixture.row_logits(batch_of(), draw), plain.row_logits(batch_of(), draw), atol=1e-12, rtol=0
        )

    def test_one_expert_is_peft(self, three_topics_model, tiny_llama):
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        model = three_topics_model(adapter=adapter_of(experts=1))
        assert "gate.weight" not in model.sites
        draw = draws_of(model)
        config, weights = model.adapters[0].to_peft(model.backbone, tuple(model.adapter_sites.values()), draw, {})
        rival = get_peft_model(
            tiny_llama(torch.float64),
            LoraConfig(r=RANK, lora_alpha=config["lora_alpha"], target_modules=config["target_modules"]),
        ).eval()
        set_peft_model_state_dict(rival, weights)
        model.backbone.bind(model.deltas(draw))
        ours = model.backbone.network(IDS).logits
        torch.testing.assert_close(ours, rival(IDS).logits, atol=1e-12, rtol=0)

    def test_a_one_hot_gate_is_the_lora_of_one_expert(self, make, three_topics_model):
        # a gate of hundreds is one-hot to the last bit
        model = make()
        draw = draws_of(model)
        draw["gate.weight"] = 1000 * draw["gate.weight"].sign() * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        batch, size = batch_of(), RANK // K
        chosen = gate_of(draw, batch)
        assert set(chosen.flatten().tolist()) == {0.0, 1.0}
        small = three_topics_model(adapter=LoRA(rank=size, alpha=ALPHA, layers=(1, 2)))
        whole = model.row_logits(batch, draw)
        for row, expert in enumerate(chosen.argmax(-1).tolist()):
            part = slice(expert * size, (expert + 1) * size)
            own = {name: draw[name][:, part] if name.endswith("A") else draw[name][..., part] for name in small.sites}
            one = {key: value[row : row + 1] for key, value in batch.items()}
            torch.testing.assert_close(small.row_logits(one, own), whole[row : row + 1], atol=1e-12, rtol=0)

    def test_it_adds_a_gate_and_nothing_else(self, model, three_topics_model):
        plain = three_topics_model(adapter=LoRA(rank=RANK, layers=(1, 2)))
        sizes = {name: site.numel for name, site in model.sites.items()}
        assert sizes.pop("gate.weight") == K * D
        assert sizes == {name: site.numel for name, site in plain.sites.items()}

    def test_training_under_equal_weights_takes_the_steps_of_plain_lora(self, three_topics_model):
        found = []
        for adapter in (adapter_of(), LoRA(rank=RANK, alpha=ALPHA, layers=(1, 2))):
            model = three_topics_model(adapter=adapter)
            draw = model.initial(torch.Generator().manual_seed(0))
            trained = [draw[name].requires_grad_() for name in draw if "lora" in name]
            if "gate.weight" in draw:
                draw["gate.weight"].zero_()
            optimiser = torch.optim.Adam(trained, lr=1e-2)
            for step in range(5):
                batch = model.encode(model.task.train).batch([step, step + 4])
                batch["sequence"] = torch.randn(2, D, dtype=torch.float64)
                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(model.row_logits(batch, draw), batch["labels"])
                loss.backward()
                optimiser.step()
            found.append([value.detach() for value in trained])
        for mine, plain in zip(*found, strict=True):
            assert plain.abs().sum() > 0
            torch.testing.assert_close(mine, plain, atol=1e-12, rtol=0)


class TestTheGate:
    def test_experts_have_no_order(self, model):
        draw, batch, size = draws_of(model), batch_of(), RANK // K
        swapped = {}
        for name, value in draw.items():
            if name.endswith("lora_A"):
                swapped[name] = value.unflatten(1, (K, size)).flip(1).flatten(1, 2)
            elif name.endswith("lora_B"):
                swapped[name] = value.unflatten(2, (K, size)).flip(2).flatten(2, 3)
            else:
                swapped[name] = value.flip(0)
        torch.testing.assert_close(model.row_logits(batch, swapped), model.row_logits(batch, draw), atol=1e-12, rtol=0)
        swapped["gate.weight"] = draw["gate.weight"]
        assert (model.row_logits(batch, swapped) - model.row_logits(batch, draw)).abs().max() > 1e-4

    def test_a_row_does_not_see_its_neighbours(self, model):
        draw, batch = draws_of(model), batch_of()
        whole = model.row_logits(batch, draw)
        for row in range(3):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            torch.testing.assert_close(model.row_logits(alone, draw), whole[row : row + 1], atol=1e-12, rtol=0)
        assert (whole - model.row_logits({**batch, "sequence": batch["sequence"].flip(0)}, draw))[0].abs().max() > 1e-4

    def test_it_starts_as_the_base_and_learns_after_b(self, model):
        start = {name: value.requires_grad_() for name, value in model.initial().items()}
        logits = model.row_logits(batch_of(), start)
        model.release()
        base = model.head(batch_of(), (), None, 0)
        torch.testing.assert_close(logits, base, atol=0, rtol=0)
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        assert start["gate.weight"].grad.abs().max() == 0
        assert start["q_proj.lora_B"].grad.abs().max() > 0

    def test_draws_ride_on_the_batch(self, model):
        draw, batch = draws_of(model, 4), batch_of()
        together = model.logits(batch, draw)
        for index in range(4):
            alone = model.row_logits(batch, {name: value[index] for name, value in draw.items()})
            torch.testing.assert_close(together[index], alone, atol=1e-12, rtol=0)

    def test_gradients_survive_checkpointing(self, make):
        found = []
        for checkpointing in (False, True):
            model = make()
            if checkpointing:
                model.backbone.checkpoint_gradients()
            pyro.set_rng_seed(3)
            draw = {name: value.requires_grad_() for name, value in draws_of(model).items()}
            model.row_logits(batch_of(), draw).square().sum().backward()
            found.append([value.grad for value in draw.values()])
        for plain, recomputed in zip(*found, strict=True):
            assert plain.abs().max() > 0
            torch.testing.assert_close(recomputed, plain, atol=1e-12, rtol=0)

    def test_beams_of_a_row_share_its_gate(self, model):
        draw, batch = draws_of(model), batch_of(2)
        model.backbone.bind(model.deltas(draw, batch))
        settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        together = model.backbone.network.generate(**inputs, **settings)
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            model.backbone.bind(model.deltas(draw, one))
            alone = model.backbone.network.generate(
                **{key: value[row : row + 1] for key, value in inputs.items()}, **settings
            )
            assert together[row].tolist() == alone[0].tolist()

    def test_no_input_is_an_error_that_says_what_to_do(self, model):
        batch = batch_of()
        del batch["sequence"]
        with pytest.raises(ValueError, match="The gate of MixtureLoRA is made from the batch entry 'sequence'"):
            model.row_logits(batch, draws_of(model))
        batch["sequence"] = torch.zeros(3, D + 2)
        with pytest.raises(ValueError, match=f"Give MixtureLoRA gate_features={D + 2}"):
            model.row_logits(batch, draws_of(model))

    def test_the_prompt_can_be_what_it_reads(self, three_topics_model):
        model = three_topics_model(adapter=adapter_of(gate_input="prompt"))
        draw, batch = draws_of(model), batch_of()
        del batch["sequence"]
        assert model.sites["gate.weight"].shape == (K, 32)
        batch["attention_mask"][0, 0] = 0
        embedded = model.backbone.network.get_input_embeddings()(IDS)
        mean = torch.stack([embedded[0, 1:].mean(0), embedded[1].mean(0), embedded[2].mean(0)])
        torch.testing.assert_close(model.backbone.prompt_embedding(batch), mean, atol=1e-14, rtol=0)
        named = three_topics_model(adapter=adapter_of(gate_features=32))
        torch.testing.assert_close(
            model.row_logits(batch, draw), named.row_logits({**batch, "sequence": mean}, draw), atol=1e-12, rtol=0
        )


class TestMerging:
    def test_one_row_can_be_merged(self, model):
        draw, batch = draws_of(model), batch_of(1)
        model.backbone.bind(model.deltas(draw, batch))
        expected = model.backbone.network(IDS).logits
        with merged(model, draw, batch) as network:
            torch.testing.assert_close(network(IDS).logits, expected, atol=1e-11, rtol=0)

    def test_no_row_and_several_rows_are_refused_and_nothing_changes(self, model):
        before = model.backbone.network.get_submodule(PATH).weight.clone()
        with pytest.raises(ValueError, match=r"merged\(model, draw, \{'sequence'"), merged(model, draws_of(model)):
            pass
        with pytest.raises(ValueError, match="hold one only"), merged(model, draws_of(model), batch_of(3)):
            pass
        assert torch.equal(model.backbone.network.get_submodule(PATH).weight, before)

    def test_there_is_no_peft_file_and_no_spectrum_of_a_change_that_varies(self, model):
        draw = draws_of(model)
        assert model.adapters[0].to_peft(model.backbone, tuple(model.adapter_sites.values()), draw, {}) is None
        assert change_spectra(model, draw) == {}


class TestRandomGates:
    @pytest.mark.parametrize(
        ("settings", "tolerance"),
        [({"gate": "dirichlet", "concentration": 1e9}, 1e-3), ({"gate": "concrete", "temperature": 1e9}, 1e-3)],
    )
    def test_their_limits(self, make, model, settings, tolerance):
        draw, batch = draws_of(model), batch_of()
        drawn = make(**settings).row_logits(batch, draw, local=True)
        limit = draw if settings["gate"] == "dirichlet" else with_uniform_gate(draw)
        torch.testing.assert_close(drawn, model.row_logits(batch, limit), atol=tolerance, rtol=0)

    def test_a_dirichlet_gate_has_the_moments_that_it_says(self, make):
        # 20,000 draws of one row; five standard errors, so it fails by chance once in a million
        concentration, rows = 5.0, 20_000
        model = make(gate="dirichlet", concentration=concentration)
        draw = draws_of(model)
        batch = batch_of(1)
        values = {**draw, "sequence": batch["sequence"].expand(rows, -1)}
        (weights,) = model.adapters[0].local_draw(values).values()
        mean = gate_of(draw, batch)[0]
        variance = mean * (1 - mean) / (concentration + 1)
        assert ((weights.mean(0) - mean).abs() < 5 * (variance / rows).sqrt()).all()
        torch.testing.assert_close(weights.var(0), variance, rtol=0.06, atol=0)

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete"])
    def test_without_local_draws_the_gate_is_its_mean(self, make, model, gate):
        draw, batch = draws_of(model), batch_of()
        noisy = make(gate=gate)
        torch.testing.assert_close(noisy.row_logits(batch, draw), model.row_logits(batch, draw), atol=0, rtol=0)
        first, second = (noisy.row_logits(batch, draw, local=True) for _ in range(2))
        assert (first - second).abs().max() > 1e-5

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete"])
    def test_gradients_reach_the_gate_through_the_draw(self, make, gate):
        model = make(gate=gate)
        draw = {name: value.requires_grad_() for name, value in draws_of(model).items()}
        model.row_logits(batch_of(), draw, local=True).square().sum().backward()
        assert draw["gate.weight"].grad.isfinite().all()
        assert draw["gate.weight"].grad.abs().max() > 0


class TestEnumeration:
    def test_it_is_what_pyro_enumerates(self, make, three_topics_model):
        model, size = make(gate="categorical"), RANK // K
        draw, batch, labels = draws_of(model), batch_of(), torch.tensor([2, 0, 1])
        plain = three_topics_model(adapter=LoRA(rank=size, alpha=ALPHA, layers=(1, 2)))
        of_expert = []
        for k in range(K):
            part = slice(k * size, (k + 1) * size)
            own = {n: draw[n][:, part] if n.endswith("A") else draw[n][..., part] for n in plain.sites}
            of_expert.append(plain.row_logits(batch, own))
        logits, weights = torch.stack(of_expert), gate_of(draw, batch)

        def program():
            with pyro.plate("data", 3):
                k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
                # enumeration puts the values of k on a dimension to the left of the plate's
                chosen = logits[k, torch.arange(3)]
                pyro.sample("label", dist.Categorical(logits=chosen), obs=labels)

        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(program, lambda: None)
        ours = model.row_logits(batch, draw)
        torch.testing.assert_close(ours.logsumexp(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
        assert -float(ours.gather(1, labels[:, None]).sum()) == pytest.approx(loss, abs=1e-10)
        # and not the mixture of weights
        assert (ours - make().row_logits(batch, draw).log_softmax(-1)).abs().max() > 1e-4

    def test_draws_and_examples_keep_their_rows(self, make):
        model = make(gate="categorical")
        draw, batch = draws_of(model, 3), batch_of()
        together = model.logits(batch, draw)
        for index in range(3):
            alone = model.row_logits(batch, {name: value[index] for name, value in draw.items()})
            torch.testing.assert_close(together[index], alone, atol=1e-12, rtol=0)

    def test_missing_options_stay_missing_and_give_no_nan(self):
        from pyrolora.models.likelihoods import mixed_logits

        logits = torch.randn(4, 3, dtype=torch.float64)
        logits[:2, 2] = -torch.inf
        logits.requires_grad_()
        mixing = torch.log(torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64))
        whole = mixed_logits(logits, mixing)
        expected = torch.tensor([[0.3], [0.7]], dtype=torch.float64) * logits[:2].softmax(-1)
        torch.testing.assert_close(whole[0].exp(), expected.sum(0), atol=1e-12, rtol=0)
        whole[:, 0].sum().backward()
        assert logits.grad.isfinite().all()

    def test_features_and_curvature_are_refused(self, make, three_topics_model):
        model = make(gate="categorical")
        with pytest.raises(ValueError, match="a network for every expert"):
            model.features(batch_of(), draws_of(model))
        with pytest.raises(ValueError, match="is not a stack of weights of linear maps"):
            Laplace(estimate=MAP(steps=1)).fit(model, with_vectors(model.task.train), progress=False)


class TestBesideALastLayer:
    """Random in ``head.weight`` alone; what a gate draws or sums out for single rows still takes part."""

    @pytest.fixture
    def headed(self, three_topics_model):
        def build(**settings):
            return three_topics_model(adapter=[adapter_of(**settings), LastLayer()], prior=dist.Normal(0.0, 1.0))

        return build

    @staticmethod
    def posterior_of(model, head_scale=0.1, start_scale=1.0):
        torch.manual_seed(0)
        start = draws_of(model, scale=start_scale)
        guide = build_guide({"*lora*": Point(), "gate*": Point(), HEAD: MeanField(head_scale)}, model, start=start)
        return Posterior(model, guide, {})

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete"])
    def test_drawn_gates_reach_the_predictions(self, headed, gate):
        model = headed(gate=gate)
        posterior = self.posterior_of(model)
        batch = model.encode(with_vectors(model.task.test)).batch([0, 1, 2])
        generator = torch.Generator().manual_seed(4)
        probs = posterior.predict(batch, draws=5, generator=generator).probs
        # the same stream: weights first, then the seed of what is drawn for single rows
        generator = torch.Generator().manual_seed(4)
        drawn = posterior.sample(5, generator=generator)
        local = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        with SeededBy(local, []):
            expected = logits_of_draws(model, batch, drawn, 5).detach().softmax(-1)
        torch.testing.assert_close(probs.double(), expected, atol=1e-6, rtol=0)
        # and the gates make a difference to it: the same weights without them
        without = model.logits(batch, drawn).detach().softmax(-1)
        assert (expected - without).abs().max() > 1e-3

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete"])
    def test_the_spread_of_drawn_gates_is_that_of_gates_drawn_by_hand(self, headed, gate):
        # 2,000 draws each of a certain head; of probabilities this far from 0 and 1 a standard deviation is then known to
        # about 2 %, and 15 % is beyond five errors of the difference
        model = headed(gate=gate)
        posterior = self.posterior_of(model, head_scale=1e-9, start_scale=0.4)
        batch = model.encode(with_vectors(model.task.test)).batch([0, 1, 2])
        probs = posterior.predict(batch, draws=2000, generator=torch.Generator().manual_seed(0)).probs.double()
        mean = {name: value.detach() for name, value in posterior.mean().items()}
        with torch.no_grad():
            many = {key: value.repeat_interleave(2000, 0) if value.dim() else value for key, value in batch.items()}
            by_hand = model.row_logits(many, mean, local=True).softmax(-1).unflatten(0, (3, 2000))
        assert by_hand.std(1).min() > 1e-3
        torch.testing.assert_close(probs.std(0), by_hand.std(1), atol=0, rtol=0.15)

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete"])
    def test_linearised_kinds_are_refused_beside_drawn_gates(self, headed, gate):
        model = headed(gate=gate)
        posterior, data = self.posterior_of(model), with_vectors(model.task.train)
        laplace = Laplace(structure="last_layer").fit(model, data, estimate=posterior, progress=False)
        for one in (posterior, laplace):
            assert not set(one.kinds) & set(LINEARISED)
            assert one.predict(data, draws=2).kind == "mc"
            for kind in ("linearised", "linearised_mf1"):
                with pytest.raises(ValueError, match=f"kind '{kind}'.*draws its gate for each row anew.*Use kind='mc'"):
                    one.predict(data, kind=kind)

    def test_a_gate_summed_out_predicts_what_the_network_says(self, headed):
        model = headed(gate="categorical")
        posterior, data = self.posterior_of(model), with_vectors(model.task.test)
        assert posterior.kinds == ("mc", "mean")
        batch = model.encode(data).batch([0, 1, 2])
        probs = posterior.predict(batch, draws=4, generator=torch.Generator().manual_seed(1)).probs
        drawn = posterior.sample(4, generator=torch.Generator().manual_seed(1))
        expected = model.logits(batch, drawn).detach().softmax(-1)
        torch.testing.assert_close(probs.double(), expected, atol=1e-6, rtol=0)
        assert posterior.predict(data, kind="mean").probs.shape == (1, len(data), 3)

    def test_no_site_beside_a_gate_summed_out_has_curvature(self, headed, three_topics_model):
        model = headed(gate="categorical")
        with pytest.raises(ValueError, match=r"'head\.weight' is not a stack.*beside gate='categorical'"):
            Laplace(structure="last_layer", estimate=MAP(steps=1)).fit(model, with_vectors(model.task.train))
        other = LoRA(rank=2, name="more", targets=("k_proj",))
        model = three_topics_model(adapter=[adapter_of(gate="categorical"), other])
        assert not any(site.linear for site in model.adapter_sites.values())

    @pytest.mark.parametrize("gate", ["dirichlet", "concrete", "categorical"])
    @pytest.mark.parametrize("engine", [VBLL(steps=1), NUTS(draws=4, warmup=1, chains=1)], ids=["VBLL", "NUTS"])
    def test_last_layer_engines_refuse_it(self, headed, gate, engine):
        model = headed(gate=gate)
        data, message = (
            with_vectors(model.task.train),
            "A last layer needs one feature vector a row, .*gate='deterministic'",
        )
        with pytest.raises(ValueError, match=message):
            engine.fit(model, data, progress=False)
        with pytest.raises(ValueError, match=message):
            engine.fit(model, data, estimate=self.posterior_of(model), progress=False)

    @pytest.mark.parametrize("gate", ["dirichlet", "categorical"])
    def test_the_gold_standard_refuses_it(self, headed, gate):
        posterior = self.posterior_of(headed(gate=gate))
        with pytest.raises(ValueError, match="A last layer needs one feature vector a row"):
            compare_to_gold(posterior, {"itself": posterior}, with_vectors(posterior.model.task.test))

    def test_a_gate_without_noise_keeps_the_one_pass(self, headed):
        model = headed()
        posterior, data = self.posterior_of(model), with_vectors(model.task.test)
        assert set(LINKS) < set(posterior.kinds)
        passes, original = [], model.backbone.body.forward
        model.backbone.body.forward = lambda *args, **kwargs: (passes.append(1), original(*args, **kwargs))[1]
        batch = model.encode(data).batch([0, 1, 2])
        # the blocks below the adapter and those above, once each; the backbone tries itself out before the first prediction
        posterior.predict(batch, draws=1)
        counts = []
        for draws in (1, 600):
            passes.clear()
            posterior.predict(batch, draws=draws, kind="mc")
            counts.append(len(passes))
        assert counts == [2, 2]


def with_vectors(split):
    generator = torch.Generator().manual_seed(5)
    examples = tuple(
        Example(one.fields, one.label, id=one.id, vectors={"sequence": torch.randn(D, generator=generator)})
        for one in split
    )
    return Split(split.name, split.task, examples, split.classes)


class TestFitting:
    @pytest.mark.parametrize("gate", ["deterministic", "dirichlet", "concrete", "categorical"])
    def test_a_bayesian_gate_of_every_kind(self, make, gate, tmp_path):
        model = make(gate=gate)
        data = with_vectors(model.task.train)
        engine = SVI(guide={"*.lora_*": Point(), "gate.weight": MeanField()}, steps=3)
        posterior = engine.fit(model, data, progress=False)
        history = posterior.record["history"]
        assert all(0 < entry["gate_entropy"] <= math.log(K) + 1e-6 for entry in history)
        for kind in posterior.kinds:
            again = [
                posterior.predict(data, draws=3, kind=kind, generator=torch.Generator().manual_seed(0)).probs
                for _ in range(2)
            ]
            assert torch.equal(*again)
            torch.testing.assert_close(again[0].sum(-1), torch.ones(again[0].shape[:2]))
        kept = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "kept"), model=model)
        assert torch.equal(kept.mean()["gate.weight"], posterior.mean()["gate.weight"])
        assert not (tmp_path / "kept" / "adapter_config.json").exists()

    def test_it_learns_what_only_the_gate_is_told(self, three_topics_model):
        """Labels that no text tells, and z does: chance is 1/3, and 120 labels differ from it by 0.13 once in a thousand."""

        def told(rows, key):
            generator = torch.Generator().manual_seed(rows)
            centres = 3 * torch.eye(3, D)
            examples = []
            for row in range(rows):
                noise = torch.randn(2, D, generator=generator)
                text = f"the {WORDS[int(torch.randint(len(WORDS), (1,), generator=generator))]}"
                vectors = {"sequence": centres[row % 3] + 0.3 * noise[0], "random_sequence": noise[1]}
                examples.append(Example({"text": text}, row % 3, id=f"{key}/{row}", vectors=vectors))
            return Split(key, "told", tuple(examples), 3)

        found = {}
        for read in ("sequence", "random_sequence"):
            adapter = adapter_of(rank=6, experts=3, gate_input=read, targets=("down_proj",), layers=(2,))
            model = three_topics_model(adapter=adapter, prior=Flat(), dtype=torch.float32)
            fitted = MAP(steps=100, batch_size=24, learning_rate=3e-2).fit(model, told(240, "train"), progress=False)
            test = told(120, "test")
            probs = fitted.predict(test).mean_probs
            labels = torch.tensor([example.label for example in test])
            found[read] = float((probs.argmax(-1) == labels).float().mean())
        assert found["sequence"] > 0.9
        assert found["random_sequence"] < 0.5

    @pytest.mark.parametrize("structure", ["diag", "kron", "full"])
    def test_laplace_of_the_gate_alone(self, make, structure):
        model = make()
        data = with_vectors(model.task.train)
        posterior = Laplace(structure=structure, sites="gate.weight", estimate=MAP(steps=2)).fit(
            model, data, progress=False
        )
        probs = posterior.predict(data, draws=4, kind="mc").probs
        assert probs.shape == (4, len(data), 3)

    def test_the_gates_full_curvature_is_the_gauss_newton_matrix(self, three_topics_model):
        model = three_topics_model(adapter=adapter_of(), prior=dist.Normal(0.0, 0.25))
        data, start = model.encode(with_vectors(model.task.train)), draws_of(model)
        estimate = Posterior(model, build_guide(Point(), model, start=start), {})
        posterior = Laplace(structure="full", sites="gate.weight").fit(model, data, progress=False, estimate=estimate)
        weight = start["gate.weight"].clone().requires_grad_()
        logits = model.row_logits(data.batch(list(range(len(data)))), {**start, "gate.weight": weight})
        total = torch.zeros(K * D, K * D, dtype=torch.float64)
        for row in logits:
            gradients = [torch.autograd.grad(entry, weight, retain_graph=True)[0].flatten() for entry in row]
            jacobian, p = torch.stack(gradients), row.detach().softmax(-1)
            total += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        expected = torch.linalg.inv(total + 16 * torch.eye(K * D, dtype=torch.float64))
        assert (expected.diagonal() < 0.9 / 16).any()
        root = dict(posterior.guide.items())["gate.weight"].scale_tril.detach()
        torch.testing.assert_close(root @ root.T, expected, atol=2e-9, rtol=0)

    def test_a_last_layer_reads_features_of_the_gated_network(self, three_topics_model):
        model = three_topics_model(adapter=[adapter_of(), LastLayer()])
        data = with_vectors(model.task.train)
        posterior = Laplace(structure="last_layer", estimate=MAP(steps=2)).fit(model, data, progress=False)
        assert posterior.predict(data, draws=2).probs.isfinite().all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"experts": 3}, "3 experts cannot share the rank 4.*1, 2, 4"),
            ({"experts": 0}, "0 experts cannot share"),
            ({"gate": "dirichlett"}, "Did you mean 'dirichlet'"),
            ({"variant": "codes"}, "Did you mean 'code'"),
            ({"concentration": 0.0}, "concentration must be positive"),
            ({"temperature": -1.0}, "temperature must be positive"),
            ({"gate_features": 0}, "gate_features must be at least 1"),
        ],
    )
    def test_one_sentence(self, settings, message):
        with pytest.raises(ValueError, match=message):
            adapter_of(**settings)

    def test_examples_must_agree_on_their_vectors(self, model):
        split = with_vectors(model.task.train)
        mixed = Split(split.name, split.task, (split.examples[0], model.task.train.examples[1]), 3)
        with pytest.raises(ValueError, match="has no vector 'sequence', and others have"):
            model.encode(mixed)

    def test_two_latents_to_sum_out_are_refused(self, three_topics_model):
        both = [adapter_of(gate="categorical"), adapter_of(gate="categorical", name="more", targets=("k_proj",))]
        model = three_topics_model(adapter=both)
        with pytest.raises(ValueError, match="2 adapters have a latent to sum out"):
            model.row_logits(batch_of(), draws_of(model))


def test_the_adapter_survives_its_description(model):
    from pyrolora.models.adapters import Adapter

    adapter = adapter_of(gate="dirichlet", variant="paper")
    assert Adapter.from_dict(adapter.to_dict()) == adapter
    assert isinstance(model.backbone, Backbone)


class TestImages:
    """A gate reads a vector that every image carries."""

    @pytest.fixture
    def shapes(self, three_shapes):
        chance = torch.Generator().manual_seed(2)

        def carrying(split):
            vectors = torch.randn(len(split), D, generator=chance)
            examples = zip(split.examples, vectors, strict=True)
            return replace(split, examples=tuple(replace(one, vectors={"state": vector}) for one, vector in examples))

        task = three_shapes()
        return replace(task, **{part: carrying(getattr(task, part)) for part in ("train", "validation", "test")})

    @pytest.fixture
    def model(self, three_shapes_model, shapes):
        mixture = MixtureLoRA(rank=RANK, experts=K, gate_input="state", gate_features=D)
        return three_shapes_model(adapter=[mixture, LastLayer()], task=shapes)

    def test_batches_hold_the_vectors_of_their_rows(self, model):
        split = model.task.train
        batch = model.encode(split).batch([4, 1])
        assert torch.equal(batch["state"], torch.stack([split.examples[row].vectors["state"] for row in (4, 1)]))
        lacking = replace(split, examples=(*split.examples[:-1], replace(split.examples[-1], vectors={})))
        with pytest.raises(ValueError, match="has no vector 'state', and others have"):
            model.encode(lacking)

    def test_every_row_has_the_change_of_its_own_weights(self, model):
        batch, draw = model.encode(model.task.test).batch([0, 3, 5]), draws_of(model)
        found = model.row_logits(batch, draw)
        rows = torch.nn.functional.layer_norm(batch["state"].double(), (D,))
        plain = LoRA(rank=RANK, alpha=RANK)
        for row, weights in enumerate((rows @ draw["gate.weight"].T).softmax(-1)):
            spread = model.adapters[0].scaling * weights.repeat_interleave(RANK // K)
            factors = {
                name: spread[:, None] * value if name.endswith("lora_A") else value for name, value in draw.items()
            }
            single = BayesianModel(model.backbone, model.task, adapter=[plain, LastLayer()])
            one = {"pixel_values": batch["pixel_values"][row : row + 1]}
            expected = single.row_logits(one, {name: factors[name] for name in single.sites})
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-10, rtol=0)

    @pytest.mark.parametrize(
        "engine",
        [
            MAP(steps=2),
            SVI(guide={"*.lora_*": BLoB(), "*.weight": MeanField()}, steps=2),
            Laplace(structure="kron", estimate=MAP(steps=2)),
        ],
        ids=["map", "blob", "laplace"],
    )
    def test_engines_take_it(self, model, engine, tmp_path):
        posterior = engine.fit(model, model.task.train, progress=False)
        again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "posterior"), model=model)
        for kind in posterior.kinds:
            probs = (
                one.predict(model.task.test, draws=3, kind=kind, generator=torch.Generator().manual_seed(0)).probs
                for one in (posterior, again)
            )
            first, second = probs
            assert first.isfinite().all()
            assert torch.equal(first, second)

    def test_what_images_do_not_have_is_refused(self, three_shapes, three_shapes_model):
        with pytest.raises(
            ValueError, match="gate_input='prompt' is the mean embedding of a text, and 'tiny' reads images"
        ):
            three_shapes_model(adapter=[MixtureLoRA(rank=RANK, experts=K, gate_input="prompt")])
        episodes = episodic(three_shapes(train=30), ways=2, queries=2)
        with pytest.raises(ValueError, match="The gate of MixtureLoRA reads 'state' of each example, and the episodes"):
            three_shapes_model(adapter=[MixtureLoRA(gate_input="state")], task=episodes)
