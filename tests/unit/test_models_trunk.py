"""Trunk, resume and the cache of trunks: exact short cuts that no bound draw disturbs."""

import pytest
import torch

from pyrolora.models.backbones import Backbone
from pyrolora.models.tasks import encode
from pyrolora.models.trunk import TrunkCache

BELOW = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


@pytest.fixture(params=["left", "right"])
def encoded(request, three_topics, tiny_tokenizer):
    task = three_topics()
    return encode(task.train, task.format, tiny_tokenizer, padding=request.param)


@pytest.mark.parametrize("first_block", [0, 1, 2, 3])
def test_trunk_and_resume_equal_the_whole_forward_exactly(backbone, encoded, first_block):
    batch = encoded.batch([0, 1, 2])
    trunk = backbone.trunk(batch, first_block)
    resumed = backbone.hidden_states(batch, trunk=trunk, first_block=first_block)
    assert torch.equal(resumed, backbone.hidden_states(batch))


def test_the_trunk_is_the_input_of_its_block(backbone, encoded):
    batch, seen = encoded.batch([0, 1]), []
    handle = backbone.blocks[2].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    backbone.hidden_states(batch)
    handle.remove()
    assert torch.equal(backbone.trunk(batch, 2), seen[0])


def test_resuming_runs_no_block_below(backbone, encoded):
    batch = encoded.batch([0, 1])
    trunk, runs = backbone.trunk(batch, 2), []
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    backbone.hidden_states(batch, trunk=trunk, first_block=2)
    assert runs == [2]


def test_after_the_last_block_no_block_runs_at_all(backbone, encoded):
    batch, end = encoded.batch([0, 1]), len(backbone.blocks)
    expected, trunk, runs = backbone.features(batch), backbone.trunk(batch, end), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(backbone.features(batch, trunk=trunk, first_block=end), expected, rtol=0, atol=1e-12)
    assert not runs


def test_a_bound_draw_of_another_model_does_not_leak_into_a_trunk(backbone, encoded):
    batch = encoded.batch([0, 1])
    clean, plain = backbone.trunk(batch, 1), backbone.features(batch)
    backbone.bind({BELOW: lambda rows: 3 * rows})
    assert torch.equal(backbone.trunk(batch, 1), clean)
    assert not torch.equal(backbone.features(batch), plain), "the draw is still bound afterwards"


def test_the_first_look_at_a_network_ignores_a_draw_bound_for_many_rows(backbone, encoded):
    def for_three_rows(rows):
        assert rows.shape[0] == 3
        return rows

    batch = encoded.batch([0, 1, 2])
    trunk = Backbone(backbone.network, None, "other").trunk(batch, 1)
    backbone.bind({BELOW: for_three_rows})
    assert backbone.hidden_states(batch, trunk=trunk, first_block=1).shape == trunk.shape


@pytest.mark.parametrize("resume", [True, False])
def test_the_blocks_come_back_when_the_forward_fails(backbone, encoded, monkeypatch, resume):
    batch, blocks = encoded.batch([0, 1]), list(backbone.blocks)
    trunk = backbone.trunk(batch, 2)
    backbone.bind({BELOW: lambda rows: rows})

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backbone.body, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone.hidden_states(batch, trunk=trunk, first_block=2) if resume else backbone.trunk(batch, 2)
    assert list(backbone.blocks) == blocks
    assert BELOW in backbone._deltas, "the bound draw came back as well"


class TestCache:
    def features(self, backbone, batch):
        return backbone.features(batch, trunk=batch["trunk"], first_block=2)

    @pytest.mark.parametrize("budget", [0, 1500, 2**20])
    def test_features_are_the_same_with_any_budget(self, backbone, encoded, budget):
        cache = TrunkCache(backbone, 2, len(encoded), budget=budget)
        for _ in range(3):
            for batch in encoded.batches(4, shuffle=True):
                expected = backbone.features(batch)
                torch.testing.assert_close(self.features(backbone, cache.attach(batch)), expected, atol=1e-10, rtol=0)
        held = sum(row.numel() * 8 for row in cache._rows if row is not None)
        assert held + cache.room == budget
        assert cache.room >= 0

    def test_a_batch_of_which_some_rows_are_cached_is_right(self, backbone, encoded):
        cache = TrunkCache(backbone, 2, len(encoded))
        cache.attach(encoded.batch([0, 1]))
        batch = encoded.batch([5, 1, 3])
        torch.testing.assert_close(
            self.features(backbone, cache.attach(batch)), backbone.features(batch), atol=1e-10, rtol=0
        )

    def test_a_cached_batch_does_not_run_the_network(self, backbone, encoded, monkeypatch):
        cache, batch = TrunkCache(backbone, 2, len(encoded)), encoded.batch([0, 1, 2])
        first = cache.attach(batch)["trunk"]
        monkeypatch.setattr(backbone, "trunk", None)
        again = cache.attach(batch)["trunk"]
        mask = batch["attention_mask"].bool()
        assert torch.equal(again[mask], first[mask])

    def test_no_trunk_is_attached_where_the_first_block_is_adapted(self, backbone, encoded):
        batch = encoded.batch([0])
        assert TrunkCache(backbone, 0, 1).attach(batch) is batch
