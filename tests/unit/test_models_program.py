"""The Pyro program: site table, likelihood scale, draws on the batch axis, shared backbones, checkpointing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import Flat, learned
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Example, OptionScoring, Split, Task, Verbaliser, encode


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(adapter=[LoRA(rank=2, alpha=4.0, layers=(1, 2)), LastLayer()])


@pytest.fixture
def options_model(tiny_llama, tiny_tokenizer):
    texts = [("the red house ?", ("a big river", "snow")), ("sun ?", ("fire water", "moon", "no no no"))]
    splits = {
        name: Split(name, "pick", tuple(Example({"text": text}, 0, options) for text, options in texts), 3)
        for name in ("train", "validation", "test")
    }
    task = Task("pick", ("A", "B", "C"), OptionScoring("{text}"), **splits, description="", licence="")
    backbone = Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")
    return BayesianModel(backbone, task, adapter=LoRA(rank=2, layers=(1, 2)))


def draws_of(model, *draws):
    shapes = {name: site.shape for name, site in model.sites.items()}
    return {name: 0.3 * torch.randn(*draws, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def batch_of(model, rows=4):
    return model.encode(model.task.train).batch(list(range(min(rows, len(model.task.train)))))


class TestSiteTable:
    def test_it_tells_name_shape_dims_prior_and_weights(self, three_topics_model, capsys):
        prior = {"*.lora_A": dist.Normal(0.0, 0.2), "q_proj.lora_B": Flat(), "v_proj.lora_B": learned(0.05)}
        prior["v_proj.lora_A"] = learned(0.1, per=("layer", "rank"), every=5)
        prior["q_proj.lora_A"] = prior.pop("*.lora_A")
        three_topics_model(prior=prior).print_sites()
        rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
        rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        assert rows == [
            ["site", "shape", "dims", "prior", "weights"],
            ["q_proj.lora_A", "(2, 2, 32)", "layer, rank, in_feature", "Normal(loc=0, scale=0.2)", "128"],
            ["q_proj.lora_B", "(2, 32, 2)", "layer, out_feature, rank", "Flat()", "128"],
            [
                "v_proj.lora_A",
                "(2, 2, 32)",
                "layer, rank, in_feature",
                "learned(scale=0.1, strength=1, after=0.5, per=(layer, rank), every=5)",
                "128",
            ],
            [
                "v_proj.lora_B",
                "(2, 16, 2)",
                "layer, out_feature, rank",
                "learned(scale=0.05, strength=1, after=0.5)",
                "64",
            ],
            ["total", "448"],
        ]

    def test_building_a_model_leaves_the_random_state_alone(self, three_topics_model):
        state = torch.get_rng_state()
        three_topics_model(prior=lambda site: dist.Normal(0.0, pyro.sample(f"{site.name}.scale", dist.HalfNormal(1.0))))
        assert torch.equal(torch.get_rng_state(), state)


class TestTrace:
    def test_the_likelihood_is_scaled_to_the_whole_data_set(self, model):
        batch, draw = batch_of(model), draws_of(model)
        trace = poutine.trace(poutine.condition(model, draw)).get_trace(batch)
        trace.compute_log_prob()
        label = trace.nodes["label"]
        logits = model.logits(batch, draw)[0]
        expected = torch.distributions.Categorical(logits=logits).log_prob(batch["labels"])
        assert label["is_observed"]
        assert label["scale"] == 12 / 4
        torch.testing.assert_close(label["log_prob_sum"], 3 * expected.sum())
        for name in model.sites:
            density = torch.distributions.Normal(0.0, torch.tensor(0.2).double()).log_prob(draw[name]).sum()
            torch.testing.assert_close(trace.nodes[name]["log_prob_sum"], density)
        assert poutine.trace(poutine.condition(model, draw)).get_trace(batch, 40).nodes["label"]["scale"] == 10

    def test_labels_are_sampled_where_the_batch_has_none(self, model):
        batch = {key: value for key, value in batch_of(model).items() if key != "labels"}
        trace = poutine.trace(model).get_trace(batch)
        assert not trace.nodes["label"]["is_observed"]
        assert trace.nodes["label"]["value"].shape == (4,)
        assert set(trace.nodes["label"]["value"].tolist()) <= {0, 1, 2}

    def test_a_missing_option_is_never_sampled_and_has_no_density(self, options_model):
        batch = {key: value for key, value in batch_of(options_model).items() if key != "labels"}
        labels = torch.stack([options_model(batch) for _ in range(50)])
        assert labels[:, 0].max() == 1, "the first question has two options"
        assert labels[:, 1].max() == 2


class TestDraws:
    @pytest.mark.parametrize("kind", ["model", "options_model"])
    def test_draws_on_the_batch_axis_equal_a_loop(self, kind, request):
        model = request.getfixturevalue(kind)
        batch, draw = batch_of(model), draws_of(model, 3)
        logits = model.logits(batch, draw)
        loop = [model.logits(batch, {name: value[i] for name, value in draw.items()})[0] for i in range(3)]
        whole = [model.row_logits(batch, {name: value[i] for name, value in draw.items()}) for i in range(3)]
        assert (logits[0] - logits[1]).nan_to_num(0.0).abs().max() > 1e-3
        torch.testing.assert_close(logits, torch.stack(loop), atol=1e-10, rtol=0)
        torch.testing.assert_close(logits, torch.stack(whole), atol=1e-10, rtol=0)

    def test_a_draw_for_every_row_gives_each_row_its_own(self, model):
        batch, draw = batch_of(model), draws_of(model, 4)
        every = model.logits(batch, draw)
        torch.testing.assert_close(model.row_logits(batch, draw), every[range(4), range(4)], atol=1e-10, rtol=0)

    def test_different_numbers_of_draws_are_refused(self, model):
        draw = draws_of(model, 3)
        draw["head.weight"] = draw["head.weight"][:2]
        with pytest.raises(ValueError, match=r"different numbers of draws: \[2, 3\]"):
            model.logits(batch_of(model), draw)


class TestSharedBackbone:
    def test_two_models_do_not_disturb_one_another(self, model):
        other = BayesianModel(model.backbone, model.task, adapter=LoRA(rank=1, targets=["q_proj", "up_proj"]))
        batch, network = batch_of(model), model.backbone.network
        plain = network(input_ids=batch["input_ids"]).logits
        alone = model.logits(batch, first := draws_of(model))
        theirs = other.logits(batch, second := draws_of(other))
        assert torch.equal(model.logits(batch, first), alone)
        assert torch.equal(other.logits(batch, second), theirs)
        other.release()
        assert torch.equal(network(input_ids=batch["input_ids"]).logits, plain)

    def test_the_start_is_the_pretrained_model(self, model):
        batch = batch_of(model)
        zero_shot = model.head(batch, (), None, 0)
        assert torch.equal(model.logits(batch, model.initial())[0], zero_shot)

    def test_the_last_layers_draw_is_added_to_the_label_rows(self, model):
        batch, rows = batch_of(model), draws_of(model)["head.weight"]
        expected = (
            model.backbone.features(batch) @ (model.backbone.label_weight(torch.tensor(model.label_ids)) + rows).T
        )
        logits = model.logits(batch, {**model.initial(), "head.weight": rows})[0]
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)


def gradients(model, batch):
    draw = {name: value.requires_grad_() for name, value in draws_of(model).items()}
    poutine.trace(poutine.condition(model, draw)).get_trace(batch).log_prob_sum().backward()
    return {name: value.grad for name, value in draw.items()}


@pytest.mark.parametrize("kind", ["model", "options_model"])
def test_gradient_checkpointing_gives_the_same_gradient(kind, request):
    model = request.getfixturevalue(kind)
    network, batch, calls = model.backbone.network, batch_of(model), []
    torch.manual_seed(1)
    expected = gradients(model, batch)
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    model.backbone.blocks[2].self_attn.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    found = gradients(model, batch)
    assert len(calls) == 2, "the block did not run again in backward"
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0)


class TestEncoding:
    def test_another_tasks_split_is_asked_with_this_models_prompt(self, model):
        other = Split("test", "elsewhere", (Example({"text": "we love rain"}, 1),), 2)
        assert model.encode(other).rows == model.encode(Split("test", "here", other.examples, 3)).rows
        assert model.logits(model.encode(other).batch([0]), draws_of(model, 2)).shape == (2, 1, 3)

    def test_a_split_encoded_for_other_classes_is_refused(self, model, tiny_tokenizer, options_model):
        train = model.task.train
        for form in (
            Verbaliser("text : {text} topic :", labels=("tech", "sport", "business")),
            OptionScoring("{text}"),
        ):
            split = train if form.kind == "label" else options_model.task.train
            with pytest.raises(ValueError, match="was encoded for other classes or another format"):
                model.encode(encode(split, form, tiny_tokenizer))
        encoded = model.encode(train)
        assert model.encode(encoded) is encoded


class TestRefusals:
    @pytest.mark.parametrize(
        ("adapter", "error", "message"),
        [
            (LoRA, TypeError, r"adapter is the class LoRA; expected an instance such as LoRA\(rank=8\)"),
            ("LoRA", TypeError, "adapter is a str; expected an instance"),
            ([], ValueError, "list of adapters is empty"),
            ([LoRA(rank=2), LoRA(rank=1)], ValueError, r"Two sites are named 'q_proj\.lora_A'"),
        ],
    )
    def test_adapters_that_are_none(self, three_topics_model, adapter, error, message):
        with pytest.raises(error, match=message):
            three_topics_model(adapter=adapter)

    def test_the_last_layer_is_refused_where_options_are_scored(self, options_model):
        with pytest.raises(ValueError, match="LastLayer needs label rows, and this task scores options instead"):
            BayesianModel(options_model.backbone, options_model.task, adapter=LastLayer())
