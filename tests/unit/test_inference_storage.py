"""Posteriors on disk: the same draws after a round trip, plain PEFT files, and refusals that leave nothing half-written."""

import json
import os

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BLoB, LowRank, Point
from pyrolora.inference import storage
from pyrolora.inference.laplace import Laplace, LaplacePosterior
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.prior_declarations import learned

LORA = LoRA(rank=2, alpha=4.0)
NORMAL = dist.Normal(0.0, 0.2)
SHORT = {"steps": 3, "batch_size": 6, "learning_rate": 0.05}
ENGINES = {
    "map": (MAP(**SHORT), [LORA], NORMAL),
    "blob": (SVI(guide=BLoB(), **SHORT), [LORA], NORMAL),
    "low_rank": (SVI(guide={"*.lora_A": LowRank(rank=2), "*.lora_B": Point()}, **SHORT), [LORA], NORMAL),
    "learned": (SVI(guide=BLoB(), **SHORT), [LORA], learned(0.1, after=0.0, per="rank")),
    "laplace": (Laplace(structure="diag", estimate=MAP(**SHORT)), [LORA], NORMAL),
    "last_layer": (Laplace(structure="last_layer", estimate=MAP(**SHORT)), [LORA, LastLayer()], NORMAL),
}


@pytest.fixture
def build(three_topics_model):
    def build(adapter=None, prior=NORMAL):
        return three_topics_model(dtype=torch.float32, adapter=[LORA] if adapter is None else adapter, prior=prior)

    return build


@pytest.fixture
def fit(build):
    def fit(name="blob"):
        engine, adapter, prior = ENGINES[name]
        model = build(adapter, prior)
        return engine.fit(model, model.task.train, progress=False)

    return fit


@pytest.fixture(autouse=True)
def known_task(three_topics, monkeypatch):
    """The task is not registered: `load` finds it all the same."""
    monkeypatch.setattr(storage, "task", lambda name, data_dir=None: three_topics())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ENGINES)
def test_a_round_trip_gives_the_same_draws_and_predictions(fit, build, tmp_path, name):
    posterior = fit(name)
    assert posterior.save_pretrained(tmp_path / "kept") == tmp_path / "kept"
    loaded = Posterior.from_pretrained(tmp_path / "kept", build().backbone)
    assert type(loaded) is type(posterior)
    assert isinstance(loaded, LaplacePosterior) == (name in ("laplace", "last_layer"))
    before, after = posterior.sample(3, generator=seeded()), loaded.sample(3, generator=seeded())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[site], after[site]) for site in before)
    assert torch.equal(posterior.log_prob(before), loaded.log_prob(after))
    task = posterior.model.task
    for kind in posterior.kinds:
        first, second = (one.predict(task.test, draws=3, kind=kind, generator=seeded()) for one in (posterior, loaded))
        assert torch.equal(first.probs, second.probs)
    assert loaded.default_kind == posterior.default_kind
    assert loaded.record == json.loads(json.dumps(posterior.record))
    assert {name: scale.tolist() for name, scale in loaded.model.prior.scales.items()} == {
        name: scale.tolist() for name, scale in posterior.model.prior.scales.items()
    }


def test_loading_into_a_model_leaves_its_learned_scales_alone(fit, build, tmp_path):
    posterior = fit("learned")
    posterior.save_pretrained(tmp_path)
    model = build(prior=posterior.model.prior.specification)
    loaded = Posterior.from_pretrained(tmp_path, model=model)
    for name, scale in posterior.model.prior.scales.items():
        assert torch.equal(loaded.model.prior.scales[name], scale)
        assert not torch.equal(model.prior.scales[name], scale)


@pytest.mark.parametrize("other", [learned(0.1), dist.Normal(0.0, 0.3)], ids=["learned", "wider"])
def test_a_model_with_another_prior_is_refused(fit, build, tmp_path, other):
    fit("blob").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"was fitted under the prior .*'Normal'.* of 'q_proj\.lora_A', and the model's is"
    ):
        Posterior.from_pretrained(tmp_path, model=build(prior=other))


def test_peft_loads_the_mean(fit, tiny_llama, tmp_path):
    from peft import PeftModel

    posterior = fit("blob")
    posterior.save_pretrained(tmp_path / "kept")
    model, mean = posterior.model, posterior.mean()
    assert mean["v_proj.lora_B"].abs().max() > 0.01, "an adapter that changes nothing would prove nothing"
    network = PeftModel.from_pretrained(tiny_llama(), tmp_path / "kept").eval()
    batch = model.encode(model.task.test).batch(list(range(9)))
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        every = network(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[
            :, -1
        ]
        wanted = every[:, list(model.task.format.label_ids(model.backbone.tokenizer))]
        found = model.logits(batch, mean)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    probs = posterior.predict(batch, kind="mean").mean_probs
    torch.testing.assert_close(probs, wanted.softmax(-1), rtol=0, atol=1e-6)


def test_models_that_peft_cannot_express_get_no_peft_files(fit, tmp_path):
    fit("last_layer").save_pretrained(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {storage.CONFIG, storage.WEIGHTS}


def test_a_callable_prior_needs_the_model(build, tmp_path):
    def prior(site):
        return dist.Normal(0.0, 0.1)

    model = build(prior=prior)
    posterior = MAP(**SHORT).fit(model, model.task.train, progress=False)
    posterior.save_pretrained(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"which a file cannot hold.*pass it as model="):
        Posterior.from_pretrained(tmp_path / "kept", model.backbone)
    loaded = Posterior.from_pretrained(tmp_path / "kept", model=build(prior=prior))
    assert all(torch.equal(value, loaded.mean()[name]) for name, value in posterior.mean().items())


class TestRefusals:
    @pytest.fixture
    def kept(self, fit, tmp_path):
        return fit().save_pretrained(tmp_path / "kept")

    def test_truncated_weights(self, kept, build):
        file = kept / storage.WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"posterior.safetensors is damaged or truncated"):
            Posterior.from_pretrained(kept, build().backbone)

    def test_missing_weights(self, kept, build):
        (kept / storage.WEIGHTS).unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks posterior.safetensors"):
            Posterior.from_pretrained(kept, build().backbone)

    @pytest.mark.parametrize(
        "damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff\xfe" + data, lambda data: b"[]"]
    )
    def test_a_damaged_config(self, kept, build, damage):
        file = kept / storage.CONFIG
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=r"posterior_config.json is damaged"):
            Posterior.from_pretrained(kept, build().backbone)

    def test_a_missing_folder_offers_the_nearest(self, kept, build):
        with pytest.raises(FileNotFoundError, match=r"No posterior at .*kepd.*Did you mean .*kept"):
            Posterior.from_pretrained(kept.with_name("kepd"), build().backbone)

    def test_a_folder_of_another_version(self, kept, build):
        config = json.loads((kept / storage.CONFIG).read_text())
        (kept / storage.CONFIG).write_text(json.dumps(config | {"format": 99}))
        with pytest.raises(ValueError, match="has format 99; this version reads 1"):
            Posterior.from_pretrained(kept, build().backbone)

    def test_another_backbone(self, kept, tiny_llama, tiny_tokenizer):
        other = Backbone(tiny_llama(seed=1), tiny_tokenizer, "other")
        with pytest.raises(ValueError, match=r"belongs to 'tiny' \(fingerprint .*not to 'other'"):
            Posterior.from_pretrained(kept, other)

    @pytest.mark.parametrize(
        "adapter", [LoRA(rank=3, alpha=4.0), LoRA(rank=2, alpha=8.0), LoRA(rank=2, alpha=4.0, targets=("k_proj",))]
    )
    def test_other_adapters_even_of_the_same_shapes(self, kept, build, adapter):
        with pytest.raises(ValueError, match=r"belongs to the adapters .*Build the model with"):
            Posterior.from_pretrained(kept, model=build(adapter=[adapter]))


class TestSavingIsWholeOrNothing:
    @pytest.fixture
    def failing(self, monkeypatch):
        def fail(tensors, path, *args, **kwargs):
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        return lambda: monkeypatch.setattr(storage, "save_file", fail)

    def test_nothing_is_left_of_a_first_save_that_failed(self, fit, tmp_path, failing):
        posterior = fit("map")
        failing()
        with pytest.raises(OSError, match="No space"):
            posterior.save_pretrained(tmp_path / "kept")
        assert list(tmp_path.iterdir()) == []

    def test_an_earlier_posterior_survives_a_save_that_failed(self, fit, tmp_path, failing, build):
        posterior = fit("map")
        posterior.save_pretrained(tmp_path / "kept")
        before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
        failing()
        with pytest.raises(OSError, match="No space"):
            fit("blob").save_pretrained(tmp_path / "kept")
        assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_an_earlier_posterior_survives_a_failure_between_the_two_moves(self, fit, tmp_path, monkeypatch):
        posterior = fit("map")
        posterior.save_pretrained(tmp_path / "kept")
        move = os.replace

        def failing_second(source, target):
            if not str(source).endswith("kept") and not str(source).endswith("-old"):
                raise OSError("interrupted")
            move(source, target)

        monkeypatch.setattr(os, "replace", failing_second)
        with pytest.raises(OSError, match="interrupted"):
            posterior.save_pretrained(tmp_path / "kept")
        assert (tmp_path / "kept" / storage.CONFIG).is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_second_save_replaces_the_first(self, fit, build, tmp_path):
        fit("map").save_pretrained(tmp_path / "kept")
        fit("last_layer").save_pretrained(tmp_path / "kept")
        assert {path.name for path in (tmp_path / "kept").iterdir()} == {storage.CONFIG, storage.WEIGHTS}
        assert not Posterior.from_pretrained(tmp_path / "kept", build().backbone).is_point

    def test_a_folder_with_something_else_is_never_deleted(self, fit, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match="is no posterior; it is left as it is"):
            fit("map").save_pretrained(tmp_path / "thesis")
        assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
        (tmp_path / "empty").mkdir()
        fit("map").save_pretrained(tmp_path / "empty")
