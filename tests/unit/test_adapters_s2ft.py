"""S2FT: dense slices against gradients of whole weights, PEFT as oracle, and the official code's defects kept out."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from torch.nn import functional

from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import S2FT, LoRA
from pyrolora.models.adapters.selection import HeadShape
from pyrolora.models.backbones import Backbone
from pyrolora.models.moments import second_moments
from pyrolora.models.permutation import permute
from pyrolora.models.prior_declarations import Flat, Relative
from pyrolora.models.serving import Served, merged, weight_change

IDS = torch.tensor([[5, 9, 17, 30], [40, 41, 42, 43], [7, 8, 60, 70]])
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


@pytest.fixture
def biased(tiny_tokenizer):
    """A Qwen2, whose q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config).double().eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return Backbone(network, tiny_tokenizer, "biased")


def made(backbone, **settings):
    adapter = S2FT(**settings)
    sites = adapter.sites(backbone, 3)
    return adapter, sites, adapter.constants(backbone, sites)


def loss_of(network):
    return functional.cross_entropy(network(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def train(network, parameters, steps, before=lambda: None):
    optimiser, losses = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0), []
    for _ in range(steps):
        optimiser.zero_grad()
        before()
        loss = loss_of(network)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


class TestAgainstWholeWeights:
    @pytest.mark.parametrize("which", ["backbone", "biased"])
    def test_its_gradient_is_the_slice_of_the_whole_weights_gradient(self, which, request):
        backbone = request.getfixturevalue(which)
        adapter, sites, constants = made(backbone, heads=2, channels=5, targets=EVERYTHING)
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        backbone.bind(adapter.deltas(sites, {**constants, **draw}))
        loss_of(backbone.network).backward()
        backbone.release()
        whole = copy.deepcopy(backbone.network).requires_grad_(True)
        loss_of(whole).backward()
        assert {site.name.split(".")[0] for site in sites} == set(EVERYTHING)
        for site in sites:
            for entry, path in enumerate(site.modules):
                gradient = whole.get_submodule(path).weight.grad
                index = constants[f"{site.name}.index"][entry]
                columns = site.name.endswith("columns")
                expected = gradient[:, index] if columns else gradient[index < site.shape[1]]
                assert expected.abs().max() > 0
                torch.testing.assert_close(draw[site.name].grad[entry], expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("draws", [(), (3,)])
    def test_the_change_is_the_chosen_columns_and_rows_and_nothing_else(self, backbone, draws):
        """The official efficiency code trains output rows of o and down, over all their inputs."""
        adapter, sites, constants = made(backbone, heads=1, channels=6, targets=EVERYTHING)
        draw = {site.name: torch.randn(*draws, *site.shape, dtype=torch.float64) for site in sites}
        for site in sites:
            for entry, path in enumerate(site.modules):
                weight = backbone.network.get_submodule(path).weight
                delta = adapter.deltas(sites, {**constants, **draw})[path]
                eye = torch.eye(weight.shape[1], dtype=torch.float64)[None]
                index = constants[f"{site.name}.index"][entry]
                for group, found in enumerate(delta(eye.repeat(max(1, *draws, 1), 1, 1)).mT):
                    value = (draw[site.name][group] if draws else draw[site.name])[entry]
                    expected = torch.zeros_like(weight)
                    if site.name.endswith("columns"):
                        expected[:, index] = value
                    else:
                        expected[index < site.shape[1]] = value
                    assert torch.equal(found, expected)

    def test_trained_numbers_are_outputs_times_channels_equally_in_every_block(self, backbone):
        _, sites, constants = made(backbone, heads=2, channels=7)
        assert {site.name: tuple(site.shape) for site in sites} == {
            "o_proj.columns": (3, 32, 16),
            "down_proj.columns": (3, 32, 7),
        }
        index = constants["down_proj.columns.index"]
        assert all(len(set(row.tolist())) == 7 and row.tolist() == sorted(row.tolist()) for row in index)
        heads = constants["o_proj.columns.index"].unflatten(1, (2, 8))
        assert torch.equal(heads - heads[..., :1], torch.arange(8).expand(3, 2, 8))
        assert not (heads[..., 0] % 8).any()

    def test_accumulated_micro_batches_are_the_big_batch(self, backbone):
        adapter, sites, constants = made(backbone, channels=5)
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        backbone.bind(adapter.deltas(sites, {**constants, **draw}))
        whole = torch.autograd.grad(backbone.features(ROWS).square().sum(), list(draw.values()))
        for row in range(3):
            part = {key: value[row : row + 1] for key, value in ROWS.items()}
            backbone.features(part).square().sum().backward()
        for value, gradient in zip(draw.values(), whole, strict=True):
            torch.testing.assert_close(value.grad, gradient, atol=1e-12, rtol=0)


class TestAgainstPEFT:
    def test_six_steps_equal_lora_with_a_frozen_one_hot_a(self, tiny_llama):
        backbone = Backbone(tiny_llama(torch.float32), None, "tiny")
        adapter, sites, constants = made(backbone, channels=6, targets=["down_proj"])
        config = LoraConfig(r=6, lora_alpha=6, target_modules=["down_proj"])
        peft = get_peft_model(copy.deepcopy(backbone.network), config)
        lora_b = []
        for entry, path in enumerate(sites[0].modules):
            layer = peft.get_submodule(f"base_model.model.{path}")
            index = constants["down_proj.columns.index"][entry]
            layer.lora_A["default"].weight.data = functional.one_hot(index, 64).float()
            layer.lora_A["default"].weight.requires_grad_(False)
            lora_b.append(layer.lora_B["default"].weight)
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        ours = train(
            backbone.network,
            list(draw.values()),
            6,
            lambda: backbone.bind(adapter.deltas(sites, {**constants, **draw})),
        )
        theirs = train(peft, lora_b, 6)
        assert ours[0] - ours[-1] > 0.05
        assert ours == pytest.approx(theirs, abs=1e-6)
        torch.testing.assert_close(draw["down_proj.columns"], torch.stack(lora_b), atol=1e-6, rtol=0)

    def test_six_steps_equal_shira_with_the_columns_as_its_mask(self, tiny_llama):
        # SHiRA trains rank * (out + in) numbers: 3 * (32 + 64) = 9 * 32
        backbone = Backbone(tiny_llama(torch.float32), None, "tiny")
        adapter, sites, constants = made(backbone, channels=9, targets=["down_proj"])
        index = dict(zip(sites[0].modules, constants["down_proj.columns.index"], strict=True))
        weights = {path: backbone.network.get_submodule(path).weight for path in index}

        def mask(layer, r, **_):
            (path,) = (path for path, weight in weights.items() if torch.equal(weight, layer.weight))
            chosen = torch.zeros_like(layer.weight)
            chosen[:, index[path]] = 1
            return chosen

        config = ShiraConfig(r=3, mask_type="random", target_modules=["down_proj"], init_weights=True)
        config.mask_fn = mask
        peft = get_peft_model(copy.deepcopy(backbone.network), config)
        trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        ours = train(
            backbone.network,
            list(draw.values()),
            6,
            lambda: backbone.bind(adapter.deltas(sites, {**constants, **draw})),
        )
        assert sum(p.numel() for p in trained) == draw["down_proj.columns"].numel()
        assert ours == pytest.approx(train(peft, trained, 6), abs=1e-6)

    def test_a_saved_posterior_is_a_lora_for_peft(self, three_topics_model, tiny_llama, tmp_path):
        adapter = S2FT(heads=1, channels=5, targets=("o_proj", "down_proj", "up_proj", "v_proj"))
        model = three_topics_model(adapter=adapter, prior=Flat())
        posterior = MAP(steps=3, learning_rate=0.02).fit(model, model.task.train, progress=False)
        folder = posterior.save_pretrained(tmp_path / "s2ft")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
        peft = PeftModel.from_pretrained(tiny_llama(torch.float64), folder).double()
        model.backbone.bind(model.deltas(posterior.mean()))
        ours = model.backbone.network(input_ids=IDS).logits
        model.release()
        assert (ours - model.backbone.network(input_ids=IDS).logits).abs().max() > 0.01
        torch.testing.assert_close(peft(input_ids=IDS).logits, ours, atol=1e-5, rtol=0)


class TestActivations:
    def saved(self, backbone, adapter):
        """Bytes that backward keeps, counted once for each storage, without the network's own weights."""
        sites = adapter.sites(backbone, 3)
        constants = adapter.constants(backbone, sites)
        draw = {s.name: torch.zeros(s.shape, dtype=torch.float64, requires_grad=True) for s in sites}
        weights = {p.untyped_storage().data_ptr() for p in backbone.network.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone.bind(adapter.deltas(sites, {**constants, **draw}))
            backbone.features(ROWS).sum()
        backbone.release()
        return sum(size for size, _ in storages.values()), sum(value.numel() for value in draw.values())

    def test_fewer_bytes_are_kept_than_by_lora_at_equal_trained_numbers(self, tiny_llama):
        backbone = Backbone(tiny_llama(torch.float64), None, "tiny")
        ours, count = self.saved(backbone, S2FT(channels=12, targets=["down_proj"]))
        theirs, other = self.saved(backbone, LoRA(rank=4, targets=["down_proj"]))
        assert count == other
        assert ours < theirs

    def test_of_the_input_only_the_slice_is_kept(self, backbone):
        adapter, sites, constants = made(backbone, channels=5, targets=["down_proj"])
        value = torch.zeros(sites[0].shape, dtype=torch.float64, requires_grad=True)
        delta = adapter.deltas(sites, {**constants, sites[0].name: value})["model.layers.0.mlp.down_proj"]
        kept = []
        rows = torch.randn(2, 7, 64, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            delta(rows)
        assert not any(shape[-1] == 64 for shape in kept if shape)
        assert any(shape[-1] == 5 for shape in kept if len(shape) > 1)


class TestSelection:
    def test_scores_are_the_declared_ones(self, three_topics_model):
        model = three_topics_model()
        backbone, paths = model.backbone, [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
        moments = second_moments(backbone, model.encode(model.task.train).batches(4), paths, diagonal=True)
        whole = copy.deepcopy(backbone.network).requires_grad_(True)
        twin = type(model)(Backbone(whole, backbone.tokenizer, "twin"), model.task, LoRA(rank=1))
        whole.requires_grad_(True)
        batch = next(iter(model.encode(model.task.train).batches(99)))
        logits = twin.head(batch, (), None, 0)
        functional.cross_entropy(logits, batch["labels"]).backward()
        for path_index, path in enumerate(paths):
            weight = backbone.network.get_submodule(path).weight
            activation = moments[path].sqrt()
            scores = {
                "weight": weight.norm(dim=0),
                "activation": activation,
                "product": weight.norm(dim=0) * activation,
                "gradient": whole.get_submodule(path).weight.grad.norm(dim=0),
            }
            for select, score in scores.items():
                for largest in (True, False):
                    adapter = S2FT(channels=6, targets=["down_proj"], select=select, largest=largest)
                    chosen = three_topics_model(adapter=adapter).constants["down_proj.columns.index"][path_index]
                    assert chosen.tolist() == sorted(score.topk(6, largest=largest).indices.tolist()), (select, largest)
        assert not any(parameter.requires_grad for parameter in backbone.network.parameters())

    def test_heads_are_scored_by_the_norm_over_their_columns(self, backbone):
        _, _, constants = made(backbone, heads=2, targets=["o_proj"], select="weight")
        for layer in range(3):
            weight = backbone.network.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight
            best = weight.unflatten(1, (4, 8)).square().sum((0, 2)).topk(2).indices.sort().values
            assert constants["o_proj.columns.index"][layer].unflatten(0, (2, 8))[:, 0].tolist() == (8 * best).tolist()

    def test_a_coupled_structure_is_whole(self, backbone):
        """Query heads lie in the chosen groups of key and value heads; up, gate and down share their channels."""
        _, sites, constants = made(backbone, heads=1, channels=4, targets=EVERYTHING)
        index = {site.name.split(".")[0]: constants[f"{site.name}.index"] for site in sites}
        width = {site.name.split(".")[0]: site.shape[1] for site in sites}

        def rows(kind, layer):
            return (index[kind][layer] < width[kind]).nonzero()[:, 0].tolist()

        for layer in range(3):
            assert rows("q_proj", layer) == index["o_proj"][layer].tolist()
            assert rows("k_proj", layer) == rows("v_proj", layer)
            assert rows("up_proj", layer) == rows("gate_proj", layer) == index["down_proj"][layer].tolist()
            assert rows("q_proj", layer)[0] // 8 // 2 == rows("k_proj", layer)[0] // 8

    def test_the_same_seed_gives_the_same_choice_in_another_process_and_for_other_layers(self, backbone):
        _, _, constants = made(backbone, channels=6, targets=["down_proj"], seed=5)
        code = (
            "import torch\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
            "from pyrolora.models.adapters import S2FT\nfrom pyrolora.models.backbones import Backbone\n"
            "c = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3,"
            " num_attention_heads=4, num_key_value_heads=2)\n"
            "b = Backbone(LlamaForCausalLM(c), None, 'x')\n"
            "a = S2FT(channels=6, targets=['down_proj'], seed=5, layers=[2, 0])\n"
            "s = a.sites(b, 3)\nprint(a.constants(b, s)['down_proj.columns.index'].tolist())"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        index = constants["down_proj.columns.index"]
        assert json.loads(out.strip().splitlines()[-1]) == index[[0, 2]].tolist()
        assert not torch.equal(
            made(backbone, channels=6, targets=["down_proj"], seed=6)[2]["down_proj.columns.index"], index
        )

    def test_random_channels_are_uniform(self, backbone):
        counts = torch.zeros(64)
        for seed in range(300):
            index = made(backbone, channels=8, targets=["down_proj"], seed=seed, layers=[0])[2]
            counts[index["down_proj.columns.index"][0]] += 1
        expected = 300 * 8 / 64
        # variance expected * (1 - 1/8) a channel: chi-square with 63 degrees of freedom, whose 10^-6 quantile is 129
        assert float(((counts - expected) ** 2 / (expected * 7 / 8)).sum()) * 63 / 64 < 129


class TestServing:
    def test_merging_and_taking_out_is_exact_and_bit_by_bit(self, tiny_llama, three_topics_model):
        model = three_topics_model(torch.float32, adapter=S2FT(channels=5, heads=1, targets=EVERYTHING))
        draw = {name: 0.3 * torch.randn(site.shape) for name, site in model.sites.items()}
        before = copy.deepcopy(model.backbone.network.state_dict())
        model.backbone.bind(model.deltas(draw))
        bound = model.backbone.network(input_ids=IDS).logits
        with merged(model, draw) as network:
            torch.testing.assert_close(network(input_ids=IDS).logits, bound, atol=1e-4, rtol=0)
            assert not any(weight.requires_grad for weight in network.parameters())
        after = model.backbone.network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        with pytest.raises(RuntimeError, match="stop here"), merged(model, draw):
            raise RuntimeError("stop here")
        assert not any(weight.requires_grad for weight in model.backbone.network.parameters())
        after = model.backbone.network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_unchosen_columns_stay_bit_by_bit_when_merged(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=S2FT(channels=5, targets=["down_proj"]))
        draw = {name: torch.randn(site.shape) for name, site in model.sites.items()}
        path = "model.layers.1.mlp.down_proj"
        before = model.backbone.network.get_submodule(path).weight.clone()
        with merged(model, draw) as network:
            changed = (network.get_submodule(path).weight != before).any(dim=0).nonzero()[:, 0]
        assert changed.tolist() == model.constants["down_proj.columns.index"][1].tolist()

    def test_disjoint_choices_add_and_touch_nothing_of_each_other(self, three_topics_model):
        first = S2FT(channels=4, targets=["down_proj"], select="weight", largest=True, name="first")
        second = S2FT(channels=4, targets=["down_proj"], select="weight", largest=False, name="second")
        model = three_topics_model(adapter=[first, second])
        draw = {name: torch.randn(site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        path = "model.layers.0.mlp.down_proj"
        weight = model.backbone.network.get_submodule(path).weight
        both = weight_change(model.deltas(draw)[path], weight)
        parts = []
        for name in ("first", "second"):
            index = model.constants[f"{name}.down_proj.columns.index"][0]
            assert torch.equal(both[:, index], draw[f"{name}.down_proj.columns"][0])
            parts.append(set(index.tolist()))
        assert not parts[0] & parts[1]

    def test_many_adapters_in_one_batch_equal_each_alone(self, three_topics_model):
        base = three_topics_model(adapter=S2FT(channels=5, seed=1))
        others = {"lora": LoRA(rank=2), "s2ft": S2FT(channels=3, seed=2, targets=["down_proj", "q_proj"])}
        models = {"first": base} | {n: type(base)(base.backbone, base.task, a) for n, a in others.items()}
        draws = {
            name: {s: 0.2 * torch.randn(site.shape, dtype=torch.float64) for s, site in model.sites.items()}
            for name, model in models.items()
        }
        served = Served(models, draws)
        ids = torch.randint(3, 128, (7, 5))
        rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        names = ["s2ft", "s2ft", "first", None, None, "lora", "lora"]
        with served.rows(names) as backbone:
            together = backbone.features(rows)
        for name in dict.fromkeys(names):
            which = [row for row, given in enumerate(names) if given == name]
            base.backbone.bind({} if name is None else models[name].deltas(draws[name]))
            alone = base.backbone.features({key: value[which] for key, value in rows.items()})
            torch.testing.assert_close(together[which], alone, atol=1e-12, rtol=0)
        with pytest.raises(ValueError, match="Did you mean 'first'"), served.rows(["frist"]):
            pass
        with pytest.raises(ValueError, match="do not stand together"), served.rows(["lora", "first", "lora"]):
            pass


class TestReload:
    def test_on_a_fresh_base_in_the_networks_own_order(self, three_topics_model, tmp_path):
        """The official code saves permuted, fused weights; here indices are in the original order."""
        adapter = S2FT(channels=5, heads=1, targets=EVERYTHING, select="activation", largest=False)
        model = three_topics_model(adapter=adapter, prior=Relative(0.1))
        posterior = MAP(steps=3).fit(model, model.task.train, progress=False)
        folder = posterior.save_pretrained(tmp_path / "s2ft")
        again = Posterior.from_pretrained(folder, model=three_topics_model(adapter=adapter, prior=Relative(0.1)))
        assert torch.equal(again.predict(model.task.test).probs, posterior.predict(model.task.test).probs)


class TestPrior:
    @pytest.mark.parametrize("targets", [["o_proj", "down_proj"], ["up_proj", "q_proj"]])
    def test_relative_scales_give_the_declared_change(self, backbone, targets):
        adapter, sites, constants = made(backbone, heads=2, channels=6, targets=targets)
        scales = adapter.relative_scales(backbone, sites, constants, 0.3)
        for site in sites:
            expected = (scales[site.name].expand(site.shape) ** 2).sum((1, 2))
            norms = torch.stack([backbone.network.get_submodule(path).weight.square().sum() for path in site.modules])
            torch.testing.assert_close((expected / norms).sqrt(), torch.full((3,), 0.3, dtype=torch.float64))

    def test_each_column_in_proportion_to_its_own(self, backbone):
        adapter, sites, constants = made(backbone, channels=6, targets=["down_proj"])
        scale = adapter.relative_scales(backbone, sites, constants, 0.3)["down_proj.columns"][0, 0]
        weight = backbone.network.get_submodule("model.layers.0.mlp.down_proj").weight
        norms = weight[:, constants["down_proj.columns.index"][0]].norm(dim=0)
        torch.testing.assert_close(scale / scale[0], norms / norms[0])

    @pytest.mark.parametrize("targets", [["o_proj", "down_proj"], ["up_proj", "q_proj"]])
    def test_equal_at_the_output_means_equal_variance_of_every_slice(self, three_topics_model, targets, tmp_path):
        adapter = S2FT(heads=2, channels=6, targets=targets, relative_to="output", samples=7)
        model = three_topics_model(torch.float64, adapter=adapter, prior=Relative(0.3))
        backbone, sites = model.backbone, list(model.adapter_sites.values())
        batches = model.encode(model.task.train.subset(7, seed=0)).batches(8)
        moments = second_moments(backbone, batches, [path for site in sites for path in site.modules])
        for site in sites:
            scale = model.prior(site).base_dist.scale
            norms = torch.stack([backbone.network.get_submodule(path).weight.square().sum() for path in site.modules])
            torch.testing.assert_close((scale.square().sum((1, 2)) / norms).sqrt(), torch.full((3,), 0.3).double())
            for layer, path in enumerate(site.modules):
                if site.name.endswith("columns"):
                    index = model.constants[f"{site.name}.index"][layer]
                    power = moments[path].diagonal()[index] * scale[layer, 0].square()
                else:
                    power = scale[layer, :, 0]
                torch.testing.assert_close(power / power.mean(), torch.ones_like(power))
        posterior = MAP(steps=1).fit(model, model.task.train, progress=False)
        again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "fit"), model=model)
        assert torch.equal(again.model.prior(sites[0]).base_dist.scale, model.prior(sites[0]).base_dist.scale)


class TestFloatTypes:
    def test_sites_are_float32_over_bfloat16_and_the_start_changes_nothing(self, tiny_llama):
        backbone = Backbone(tiny_llama(torch.bfloat16), None, "tiny")
        adapter, sites, constants = made(backbone, channels=5, targets=EVERYTHING)
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        before = backbone.features(ROWS)
        backbone.bind(adapter.deltas(sites, {**constants, **draw}))
        after = backbone.features(ROWS)
        assert torch.equal(after, before)
        after.float().square().sum().backward()
        assert {value.grad.dtype for value in draw.values()} == {torch.float32}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"select": "activations"}, "Unknown selection 'activations'. Did you mean 'activation'"),
            ({"channels": 65}, "down_proj of tiny has 64 channels; 65 are asked for"),
            ({"heads": 5}, "o_proj of tiny has 4 heads; 5 are asked for"),
            ({"heads": 3, "targets": ["v_proj"]}, "v_proj of tiny has 2 key and value heads; 3 are asked for"),
            ({"relative_to": "outputs"}, "Unknown relative_to 'outputs'. Did you mean 'output'"),
            ({"heads": 0}, "heads must be at least 1; got 0"),
            ({"targets": ["lm_head"]}, "'lm_head' of tiny does not exist"),
        ],
    )
    def test_what_came_what_was_expected(self, backbone, settings, message):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
            S2FT(**settings).sites(backbone, 3)
        assert message in str(refused.value)

    def test_head_shapes_are_read_from_the_configuration(self, backbone):
        assert HeadShape.of(backbone) == HeadShape(heads=4, groups=2, width=8)


class TestPermutation:
    @pytest.mark.parametrize("which", ["backbone", "biased"])
    def test_chosen_units_first_and_the_network_computes_what_it_did(self, which, request):
        """The official conversion breaks on grouped heads and on biases."""
        backbone = request.getfixturevalue(which)
        before = backbone.network(input_ids=IDS).logits
        orders = {0: torch.tensor([3, 2, 0, 1]), 1: torch.tensor([0, 1, 3, 2])}
        channels = {0: torch.randperm(64), 1: torch.randperm(64)}
        weights = copy.deepcopy(backbone.network.state_dict())
        permute(backbone, orders, channels)
        torch.testing.assert_close(backbone.network(input_ids=IDS).logits, before, atol=1e-10, rtol=0)
        after = backbone.network.state_dict()
        key = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(after[key], weights[key][:, channels[0]])
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            key = f"model.layers.0.self_attn.{kind}.weight"
            assert not torch.equal(after[key], weights[key])

    def test_torn_groups_and_other_lists_are_refused(self, backbone):
        with pytest.raises(ValueError, match=r"tears heads apart that share a key and value head. Keep runs of 2"):
            permute(backbone, {0: torch.tensor([0, 2, 1, 3])}, {})
        with pytest.raises(ValueError, match="channels of block 1 is no permutation of 0 to 63"):
            permute(backbone, {}, {1: torch.zeros(64, dtype=torch.int64)})
