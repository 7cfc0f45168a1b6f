"""Interruption, resume, foreign and damaged states, and losses that stop being finite."""

import pyro.distributions as dist
import pytest
import torch

from pyrolora.guides import BLoB, MeanField, Point
from pyrolora.inference import checkpoint
from pyrolora.inference.map import MAP
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.adapters import LoRA, PoLAR
from pyrolora.models.prior_declarations import learned
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import Example, Split

STEPS = 7
# 12 rows in batches of 5 make 3 steps an epoch: the interruption falls inside the second one
BATCH = 5

ENGINES = {
    "svi": (SVI(guide=BLoB(), steps=STEPS, batch_size=BATCH), None),
    "svi, learned prior": (SVI(guide=MeanField(), steps=STEPS, batch_size=BATCH), learned(0.1, after=0.3)),
    "svi, relevance": (
        SVI(guide=MeanField(), steps=STEPS, batch_size=BATCH),
        learned(0.1, after=0.0, per=("layer", "rank"), every=2),
    ),
    "svi, natural widths": (SVI(guide=BLoB(), steps=STEPS, batch_size=BATCH, width="natural"), None),
    "svi, two particles": (SVI(guide=BLoB(), steps=STEPS, batch_size=BATCH, particles=2, noise="weight"), None),
    "svi, averaged": (SVI(guide=BLoB(), steps=STEPS, batch_size=BATCH, average=0.6), None),
    "map": (MAP(steps=STEPS, batch_size=BATCH), None),
}


def with_folder(engine, folder, **changes):
    return type(engine)(**{**vars(engine), "checkpoint": folder, **changes})


def everything(model, posterior):
    scales = {f"prior {name}": scale.clone() for name, scale in model.prior.scales.items()}
    return {**posterior.guide.state_dict(), **scales}


def interrupt_step(monkeypatch, number, where):
    """Raise KeyboardInterrupt in a step: in the middle of the backbone, or after half of the update."""
    count = 0
    original = TrainingRun.take_step

    def take_step(run, batch):
        nonlocal count
        count += 1
        if count != number:
            return original(run, batch)

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        if where == "forward":
            run.model.backbone.features = stop
        else:
            with torch.no_grad():
                update = run.optimiser.step

            def half(factor):
                update(factor)
                raise KeyboardInterrupt

            run.optimiser.step = half
        try:
            return original(run, batch)
        finally:
            vars(run.model.backbone).pop("features", None)

    monkeypatch.setattr(TrainingRun, "take_step", take_step)


@pytest.mark.parametrize("where", ["forward", "update"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_interrupted_fit_ends_bit_for_bit_where_an_uninterrupted_one_does(
    three_topics_model, tmp_path, monkeypatch, name, where
):
    engine, prior = ENGINES[name]
    model = three_topics_model(torch.float32, prior=prior)
    whole = engine.fit(model, model.task.train, progress=False)
    expected = everything(model, whole)
    kept = with_folder(engine, tmp_path, checkpoint_every=2)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 6, where)
        with pytest.raises(KeyboardInterrupt):
            kept.fit(model, model.task.train, progress=False)
    # another process would meet another random state and a fresh model
    torch.manual_seed(99)
    model = three_topics_model(torch.float32, prior=prior)
    run = TrainingRun(kept, model, model.task.train)
    assert run.step == (5 if where == "forward" else 4)
    resumed = kept.fit(model, model.task.train, progress=False)
    assert resumed.record["history"] == whole.record["history"]
    found = everything(model, resumed)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def in_column_order(value):
    """The same numbers, laid out column by column: what a QR decomposition or a transposition gives."""
    return value.mT.contiguous().mT


@pytest.mark.parametrize("adapter", [LoRA(rank=2), PoLAR(rank=2)], ids=["LoRA", "PoLAR"])
def test_the_memory_order_of_a_start_changes_nothing_resumed_or_not(three_topics_model, tmp_path, adapter):
    model = three_topics_model(torch.float32, adapter=adapter)
    initial = model.initial(torch.Generator().manual_seed(3))
    start = {name: in_column_order(value) for name, value in initial.items()}
    assert not any(value.is_contiguous() for value in start.values())
    step = "landing" if isinstance(adapter, PoLAR) else "retraction"
    engine = SVI(
        guide=MeanField() if step == "retraction" else Point(), steps=12, learning_rate=1e-2, manifold_step=step
    )
    expected = engine.fit(model, model.task.train, progress=False, start=initial).mean()
    kept = with_folder(engine, tmp_path, checkpoint_every=1)
    stream = TrainingRun(kept, model, model.task.train, start=start).steps()
    for _ in range(5):
        next(stream)
    stream.close()
    found = kept.fit(model, model.task.train, progress=False, start=start).mean()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.fixture
def interrupted(three_topics_model, tmp_path, monkeypatch):
    """An engine, its model, and a folder with the state after three of seven steps."""
    model = three_topics_model(torch.float32)
    engine = with_folder(ENGINES["svi"][0], tmp_path)
    with monkeypatch.context() as patch:
        interrupt_step(patch, 4, "forward")
        with pytest.raises(KeyboardInterrupt):
            engine.fit(model, model.task.train, progress=False)
    return engine, model, tmp_path


class TestForeignStates:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"learning_rate": 0.5}, r"settings\.learning_rate was 0\.001 and is now 0\.5"),
            ({"seed": 1}, r"seed was 0 and is now 1"),
            ({"guide": BLoB(init_scale=0.3)}, r"settings\.guide\.init_scale was None and is now 0\.3"),
        ],
    )
    def test_other_settings_are_refused_by_the_first_difference(self, interrupted, changes, named):
        engine, model, folder = interrupted
        with pytest.raises(ValueError, match=named):
            with_folder(engine, folder, **changes).fit(model, model.task.train, progress=False)

    def test_checkpoint_every_may_change(self, interrupted):
        engine, model, folder = interrupted
        assert TrainingRun(with_folder(engine, folder, checkpoint_every=1), model, model.task.train).step == 3

    @pytest.mark.parametrize("change", ["another label", "another last word", "one row less"])
    def test_other_data_are_refused(self, interrupted, change):
        engine, model, _ = interrupted
        split = model.task.train
        last = split.examples[-1]
        changed = {
            "another label": (Example(last.fields, (last.label + 1) % 3),),
            "another last word": (Example({"text": last.fields["text"] + " dog"}, last.label),),
            "one row less": (),
        }[change]
        other = Split(split.name, split.task, (*split.examples[:-1], *changed), split.classes)
        with pytest.raises(ValueError, match="data was '12:"):
            engine.fit(model, other, progress=False)

    @pytest.mark.parametrize(
        ("adapter", "prior", "named"),
        [
            # same shapes everywhere, another network
            (LoRA(rank=2, alpha=9.0, layers=(1, 2)), None, "adapters was"),
            (LoRA(rank=2, alpha=4.0, layers=(0, 2)), None, "adapters was"),
            (None, dist.Normal(0.0, 0.7), r"prior\.q_proj\.lora_A\.parameters\.scale"),
        ],
    )
    def test_another_model_is_refused(self, interrupted, adapter, prior, named):
        engine, model, _ = interrupted
        other = BayesianModel(model.backbone, model.task, adapter=adapter or model.adapters, prior=prior)
        with pytest.raises(ValueError, match=named):
            engine.fit(other, other.task.train, progress=False)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
    def test_a_damaged_state_says_so_and_how_to_start_over(self, interrupted, damage):
        engine, model, folder = interrupted
        file = folder / checkpoint.FILE
        whole = file.read_bytes()
        file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff" * 200}[damage])
        with pytest.raises(ValueError, match=r"damaged.*Delete it"):
            engine.fit(model, model.task.train, progress=False)

    def test_nothing_half_written_is_left(self, interrupted):
        assert [file.name for file in interrupted[2].iterdir()] == [checkpoint.FILE]


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # that is the point here
class TestNonFiniteLoss:
    def test_the_site_with_the_bad_value_is_named_though_all_gradients_are_bad(self, three_topics_model):
        model = three_topics_model()
        start = {"v_proj.lora_A": torch.full(model.sites["v_proj.lora_A"].shape, torch.nan)}
        with pytest.raises(FloatingPointError, match=r"at step 1, first in the site 'v_proj\.lora_A'"):
            SVI(steps=2).fit(model, model.task.train, progress=False, start=start)

    def test_a_bad_kl_names_its_site(self, three_topics_model):
        model = three_topics_model()
        engine = SVI(guide={"v_proj.lora_B": MeanField(init_scale=1e30), "*A": BLoB(), "q*B": Point()}, steps=2)
        model.row_logits = lambda batch, draw, local=False: torch.zeros(len(batch["labels"]), 3)
        start = {"v_proj.lora_B": torch.full(model.sites["v_proj.lora_B"].shape, 1e200, dtype=torch.float64)}
        with pytest.raises(
            FloatingPointError, match=r"loss became inf .* at step 1, first in the site 'v_proj\.lora_B'"
        ):
            engine.fit(model, model.task.train, progress=False, start=start)

    def test_a_bad_likelihood_is_named_and_the_last_good_state_stays(self, three_topics_model, tmp_path):
        model = three_topics_model(torch.float32)
        engine = SVI(steps=STEPS, batch_size=BATCH, checkpoint=tmp_path, checkpoint_every=1)
        run = TrainingRun(engine, model, model.task.train)
        steps = run.steps()
        for _ in range(3):
            next(steps)
        good = {key: value.clone() for key, value in run.guide.state_dict().items()}
        features = model.backbone.features
        model.backbone.features = lambda *args, **kwargs: features(*args, **kwargs) * torch.nan
        with pytest.raises(FloatingPointError, match=f"step 4, first in the likelihood .*{tmp_path}"):
            next(steps)
        kept = TrainingRun(engine, model, model.task.train)
        assert kept.step == 3
        assert all(torch.equal(value, good[key]) for key, value in kept.guide.state_dict().items())
        assert model.backbone._deltas == {}

    def test_no_state_is_promised_where_none_was_written(self, three_topics_model, tmp_path):
        model = three_topics_model()
        start = {"v_proj.lora_A": torch.full(model.sites["v_proj.lora_A"].shape, torch.nan)}
        with pytest.raises(FloatingPointError) as failure:
            SVI(steps=2, checkpoint=tmp_path).fit(model, model.task.train, progress=False, start=start)
        assert "last good state" not in str(failure.value)
