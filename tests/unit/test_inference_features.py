"""The feature cache: what it returns, what it is keyed by, and what it refuses."""

import dataclasses

import pytest
import torch

from pyrolora.inference.features import FeatureCache, feature_identity, load_features
from pyrolora.models.adapters import LastLayer, LoRA, PiSSA, PoLAR
from pyrolora.models.tasks import Split


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(torch.float32, adapter=[LoRA(rank=2), LastLayer()])


@pytest.fixture
def draw(model):
    return {name: 0.3 * torch.randn(site.shape) for name, site in model.sites.items()}


def count_passes(model):
    passes, original = [], model.backbone.features

    def counted(batch, **kwargs):
        passes.append(len(batch["input_ids"]))
        return original(batch, **kwargs)

    model.backbone.features = counted
    return passes


def test_features_are_those_of_the_model_in_the_order_of_the_data(model, draw, tmp_path):
    cache, passes = FeatureCache(tmp_path, batch_size=5), count_passes(model)
    found = cache.features(model, draw, model.task.train)
    batch = next(iter(model.encode(model.task.train).batches(12)))
    expected = torch.empty_like(found.values)
    expected[batch["index"]] = model.features(batch, draw)
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=0)
    assert found.labels.tolist() == [example.label for example in model.task.train]
    assert sum(passes[:-1]) == 12
    # the logits of cached features are the model's own
    logits = model.row_logits(batch, draw)
    torch.testing.assert_close(model.feature_logits(found.values, draw)[batch["index"]], logits, atol=1e-5, rtol=0)


def test_a_second_call_reads_the_file(model, draw, tmp_path):
    passes = count_passes(model)
    first = FeatureCache(tmp_path).features(model, draw, model.task.train)
    before = len(passes)
    again = FeatureCache(tmp_path).features(model, draw, model.task.train)
    assert len(passes) == before
    assert torch.equal(first.values, again.values)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    other = {**draw, "head.weight": draw["head.weight"] + 1}
    FeatureCache(tmp_path).features(model, other, model.task.train)
    assert len(passes) == before


def test_another_draw_adapter_or_split_is_another_file(three_topics_model, model, draw, tmp_path):
    cache = FeatureCache(tmp_path)
    cache.features(model, draw, model.task.train)
    cache.features(model, draw, model.task.test)
    cache.features(model, {name: value + 1e-3 for name, value in draw.items()}, model.task.train)
    other = three_topics_model(torch.float32, adapter=[PoLAR(rank=2), LastLayer()])
    cache.features(other, other.initial(torch.Generator().manual_seed(0)), other.task.train)
    assert len(list(tmp_path.iterdir())) == 4


def test_constants_and_words_are_part_of_the_key(three_topics_model):
    model = three_topics_model(torch.float32, adapter=[PiSSA(rank=2, iterations=4), LastLayer()])
    draw = {name: 0.3 * torch.randn(site.shape) for name, site in model.sites.items()}
    data = model.encode(model.task.train)
    identity = feature_identity(model, draw, data)
    assert feature_identity(model, draw, data) == identity
    moved = model.with_constants({name: 2 * value for name, value in model.constants.items()})
    other = feature_identity(moved, draw, data)
    assert [key for key in identity if identity[key] != other[key]] == ["adapter"]
    first, *rest = model.task.train.examples
    swapped = dataclasses.replace(first, fields={"text": " ".join(reversed(first.fields["text"].split()))})
    texts = model.encode(Split("train", "three_topics", (swapped, *rest), 3))
    other = feature_identity(model, draw, texts)
    assert [key for key in identity if identity[key] != other[key]] == ["data"]


def test_without_a_folder_nothing_is_written(model, draw, tmp_path, monkeypatch):
    monkeypatch.setenv("PYROLORA_CACHE", str(tmp_path))
    FeatureCache(None).features(model, draw, model.task.test)
    assert not list(tmp_path.rglob("*"))
    FeatureCache().features(model, draw, model.task.test)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_a_file_of_another_model_or_a_damaged_one_is_refused(model, draw, tmp_path, tiny_llama, tiny_tokenizer):
    cache = FeatureCache(tmp_path)
    cache.features(model, draw, model.task.train)
    (path,) = tmp_path.iterdir()
    identity = feature_identity(model, draw, model.encode(model.task.train))
    load_features(path, identity, model)
    with pytest.raises(ValueError, match=r"is of another model: it was made with '\w+', and 'ffff' is in use"):
        load_features(path, {**identity, "model": "ffff"}, model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        cache.features(model, draw, model.task.train)
