"""Heads: label rows with what an architecture does to its logits, and options scored in one row."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pyrolora.models import heads
from pyrolora.models.adapters.base import grouped_linear
from pyrolora.models.backbones import Backbone
from pyrolora.models.heads import LabelHead, OptionHead
from pyrolora.models.tasks import Example, OptionScoring, Split, encode

LABELS = torch.tensor([3, 5, 9])
ROWS = {"input_ids": torch.tensor([[5, 9, 17, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
EXAMPLES = (
    Example({"q": "the red house ?"}, 1, ("a big river", "snow", "old white car")),
    Example({"q": "sun ?"}, 0, ("fire water", "moon")),
    Example({"q": "we see a bird in that tree and run ?"}, 0, ("no", "yes yes yes yes")),
)
PATH = "model.layers.1.self_attn.q_proj"


class TestLabelHead:
    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            ("gemma2", {"final_logit_softcapping": 2.0, "num_key_value_heads": 2, "head_dim": 8}),
            ("cohere", {"logit_scale": 0.3}),
            ("granite", {"logits_scaling": 5.0}),
            ("phi", {}),  # an output embedding with a bias
        ],
    )
    def test_it_follows_the_architectures_own_logits(self, kind, config):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "initializer_range": 0.5, **config}
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).double()
        backbone = Backbone(network, None, kind)
        if kind == "phi":
            torch.nn.init.normal_(network.lm_head.bias)
        expected = network(input_ids=ROWS["input_ids"]).logits[:, -1, LABELS]
        plain = backbone.features(ROWS) @ backbone.label_weight(LABELS).T
        assert (plain - expected).abs().max() > 0.01, "the architecture would show nothing"
        # 1e-6: some networks compute their rotary angles in float32
        torch.testing.assert_close(LabelHead(backbone, LABELS)(ROWS, (), None, 0), expected, atol=1e-6, rtol=0)

    def test_a_change_of_the_rows_is_added_one_for_each_run_of_rows(self, tiny_llama):
        head = LabelHead(Backbone(tiny_llama(torch.float64), None, "tiny"), LABELS)
        change = torch.randn(2, 3, 32, dtype=torch.float64)
        twice = {key: value.repeat(2, 1) for key, value in ROWS.items()}
        features = head.backbone.features(ROWS)
        expected = torch.cat([features @ (head.weight + change[i]).T for i in range(2)])
        torch.testing.assert_close(
            head(twice, [partial(grouped_linear, weight=change)], None, 0), expected, atol=1e-12, rtol=0
        )
        torch.testing.assert_close(
            head(ROWS, [partial(grouped_linear, weight=change[1])], None, 0), expected[1:], atol=1e-12, rtol=0
        )


def unpacked_scores(network, encoded):
    """One row of the full model an option: the oracle of shared prompts."""
    rows = []
    for row in encoded.rows:
        ids, segments, scored = (torch.tensor(row.input_ids), torch.tensor(row.segment_ids), torch.tensor(row.scored))
        scores = [torch.tensor(-torch.inf, dtype=torch.float64)] * encoded.classes
        for option, length in enumerate(row.option_lengths):
            kept = (segments == 1) | (segments == 2 + option)
            logits = network(input_ids=ids[kept][None]).logits[0].log_softmax(-1)
            places = scored[kept].nonzero()[:, 0]
            scores[option] = logits[places - 1, ids[kept][places]].sum() / length
        rows.append(torch.stack(scores))
    return torch.stack(rows)


class TestOptionHead:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize("form", [OptionScoring("{q}"), OptionScoring("{q}", normalise="character")])
    def test_options_in_one_row_equal_a_row_each(self, tiny_llama, tiny_tokenizer, attention, padding, form):
        network = tiny_llama(torch.float64, attn_implementation=attention)
        encoded = encode(Split("test", "toy", EXAMPLES, 4), form, tiny_tokenizer, padding=padding)
        scores = OptionHead(Backbone(network, tiny_tokenizer, "tiny"))(encoded.batch([0, 1, 2]), (), None, 0)
        expected = unpacked_scores(network, encoded)
        torch.testing.assert_close(scores, expected, atol=1e-10, rtol=0)
        assert scores.isneginf().sum(1).tolist() == [1, 2, 2], "four options are possible, these have three and two"

    def test_partial_scoring_scores_only_what_follows_the_blank(self, tiny_llama, tiny_tokenizer):
        examples = (Example({"q": "the cat saw _ in the snow ."}, 0, ("red fish", "birds")),)
        form = OptionScoring("{q}", blank="_")
        encoded = encode(Split("test", "toy", examples, 2), form, tiny_tokenizer)
        network = tiny_llama(torch.float64)
        scores = OptionHead(Backbone(network, tiny_tokenizer, "tiny"))(encoded.batch([0]), (), None, 0)
        torch.testing.assert_close(scores, unpacked_scores(network, encoded), atol=1e-10, rtol=0)

    def test_options_follow_the_architectures_own_logits(self, tiny_llama, tiny_tokenizer):
        network = tiny_llama(torch.float64)
        encoded = encode(Split("test", "toy", EXAMPLES, 3), OptionScoring("{q}"), tiny_tokenizer)

        def capped(input_ids):
            output = network(input_ids=input_ids)
            output.logits = 2.0 * torch.tanh(output.logits / 2.0)
            return output

        expected = unpacked_scores(capped, encoded)
        network.config.final_logit_softcapping = 2.0
        scores = OptionHead(Backbone(network, None, "capped"))(encoded.batch([0, 1, 2]), (), None, 0)
        torch.testing.assert_close(scores, expected, atol=1e-10, rtol=0)

    def test_a_bfloat16_backbone_scores_in_float32(self, tiny_llama, tiny_tokenizer):
        encoded = encode(Split("test", "toy", EXAMPLES, 3), OptionScoring("{q}"), tiny_tokenizer)
        batch = encoded.batch([0, 1, 2])
        scores, exact = (
            OptionHead(Backbone(tiny_llama(dtype), None, "tiny"))(batch, (), None, 0)
            for dtype in (torch.bfloat16, torch.float32)
        )
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, atol=0.3, rtol=0)

    @pytest.mark.parametrize("rows_at_once", [1, 3, 256])
    def test_gradients_through_recomputed_chunks_equal_the_unchunked_ones(
        self, tiny_llama, tiny_tokenizer, monkeypatch, rows_at_once
    ):
        monkeypatch.setattr(heads, "ROWS_AT_ONCE", rows_at_once)
        backbone = Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")
        encoded = encode(Split("test", "toy", EXAMPLES, 3), OptionScoring("{q}"), tiny_tokenizer)
        weight = (0.1 * torch.randn(32, 32, dtype=torch.float64)).requires_grad_()
        backbone.bind({PATH: lambda rows: rows @ weight.T})

        def gradient(scores):
            return torch.autograd.grad(-scores.log_softmax(1)[torch.arange(3), encoded.labels].sum(), weight)[0]

        packed = gradient(OptionHead(backbone)(encoded.batch([0, 1, 2]), (), None, 0))
        unpacked = gradient(unpacked_scores(backbone.network, encoded))
        assert unpacked.abs().max() > 0.1
        # Llama's norms work in float32 whatever the weights' type, forward and backward
        torch.testing.assert_close(packed, unpacked, atol=1e-6, rtol=0)

    def test_vocabulary_logits_are_formed_for_scored_tokens_only(self, tiny_llama, tiny_tokenizer):
        backbone = Backbone(tiny_llama(), tiny_tokenizer, "tiny")
        encoded = encode(Split("test", "toy", EXAMPLES, 3), OptionScoring("{q}"), tiny_tokenizer)
        batch, rows = encoded.batch([0, 1, 2]), []
        backbone.network.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
        OptionHead(backbone)(batch, (), None, 0)
        assert sum(rows) == batch["scored"].sum()


class TestGroupedLinear:
    def test_each_run_of_rows_meets_its_own_matrix(self):
        rows, weight = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
        expected = torch.stack([rows[row] @ weight[row // 2].T for row in range(6)])
        torch.testing.assert_close(grouped_linear(rows, weight), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(grouped_linear(rows, weight[0])[:2], expected[:2], atol=1e-12, rtol=0)

    def test_rows_that_do_not_divide_are_refused(self):
        with pytest.raises(ValueError, match="5 rows do not divide into 3 draws"):
            grouped_linear(torch.zeros(5, 2, 4), torch.zeros(3, 7, 4))
