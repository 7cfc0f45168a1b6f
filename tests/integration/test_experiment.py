"""`compare` and `fit_one` from end to end on a tiny Llama: files, reruns, interruptions, costs and overrides."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from pyrolora.inference.evaluation.cell import Cell
from pyrolora.inference.evaluation.experiment import (
    ExperimentConfig,
    _task,
    compare,
    fit_one,
    foreign_items,
    read_config,
)
from pyrolora.inference.evaluation.methods import METHODS as METHODS_BY_NAME
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.loading import load_backbone

METHODS = ("mle", "map", "blob", "laplace")
SHORT = {"steps": 4, "batch_size": 8, "learning_rate": 0.02}


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """An empty figure instead of the diagrams, whose drawing takes longer than everything else."""
    monkeypatch.setattr(Report, "reliability_diagram", lambda self: (Figure(), None))


@pytest.fixture
def config(tiny_folder, reviews):
    """Return ``build(**changes)``: a comparison that takes a second."""

    def build(**changes):
        settings = {name: dict(SHORT) for name in ("mle", "map", "blob")}
        for name, values in changes.pop("settings", {}).items():
            settings[name] = settings.get(name, {}) | values
        usual = {
            "model": str(tiny_folder), "task": "uci_sentiment", "data_dir": str(reviews), "methods": METHODS,
            "adapter": "LoRA(rank=2, alpha=4)", "dtype": "float32", "train_size": 24, "test_size": 30, "draws": 3,
        }  # fmt: skip
        return ExperimentConfig(**(usual | changes), settings=settings)

    return build


@pytest.fixture
def fits(monkeypatch):
    """Count the fits by engine."""
    counted = Counter()
    for engine in (SVI, Laplace):
        real = engine.fit

        def counting(self, *args, real=real, **kwargs):
            counted[type(self).__name__] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(engine, "fit", counting)
    return counted


def metrics(report):
    """Method and seed -> every metric's value and interval; what a fit cost is left out."""
    return {
        (row.method, row.seed): {name: (one.value, one.low, one.high) for name, one in row.metrics.items()}
        for row in report.rows
    }


def rows(report):
    return [(row.method, row.seed) for row in report.rows]


def test_a_comparison_writes_its_report_and_one_folder_a_method(config, tmp_path, monkeypatch):
    monkeypatch.undo()  # with its real pictures
    report = compare(config(), tmp_path / "run", progress=False)
    assert rows(report) == [(name, 0) for name in ("zero-shot", *METHODS)]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "report.md", "report.json", "reliability.png", "config.yaml", "zero-shot", *METHODS,
    }  # fmt: skip
    for name in METHODS:
        kept = {path.name for path in (tmp_path / "run" / name / "seed-0").iterdir()}
        assert {"posterior_config.json", "posterior.safetensors", "report.json", "adapter_model.safetensors"} <= kept
        assert [path.name for path in (tmp_path / "run" / name).iterdir()] == ["seed-0"], "no training state is left"
    assert metrics(Report.load(tmp_path / "run")) == metrics(report)
    assert [row.kind for row in report.rows] == ["mean", "mean", "mean", "mc", "linearised"]
    assert (tmp_path / "run" / "report.md").read_text() == report.to_markdown()


def test_the_written_config_is_resolved_and_can_be_run_again(config, tmp_path, fits):
    first = compare(config(), tmp_path / "one", progress=False)
    written = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    # defaults are written out, so that a later version's other defaults change nothing
    assert (
        written["settings"]["blob"] | {"steps": 4, "kl_weight": 0.01, "noise": "example", "guide": "BLoB()"}
        == (written["settings"]["blob"])
    )
    assert written["settings"]["laplace"] == METHODS_BY_NAME["laplace"].to_dict()
    assert {"structure", "precision", "batch_size", "estimate"} <= written["settings"]["laplace"].keys()
    again = ExperimentConfig.from_dict(read_config(tmp_path / "one" / "config.yaml"))
    assert metrics(compare(again, tmp_path / "two", progress=False)) == metrics(first)
    fits.clear()
    compare(again, tmp_path / "one", progress=False)
    assert not fits


def test_a_rerun_computes_nothing_again(config, tmp_path, fits, monkeypatch):
    first = compare(config(), tmp_path / "run", progress=False)
    assert fits == {"MAP": 2, "SVI": 1, "Laplace": 1}
    fits.clear()
    monkeypatch.setattr(Posterior, "predict", lambda *args, **kwargs: pytest.fail("predicted again"))
    again = compare(config(), tmp_path / "run", progress=False)
    assert not fits
    assert again.to_dict() == first.to_dict()  # empty bins hold NaN, which equals nothing


def test_an_interrupted_comparison_goes_on_to_the_same_table(config, tmp_path, fits, monkeypatch):
    whole = compare(config(), tmp_path / "whole", progress=False)
    step = TrainingRun.take_step

    def interrupted(self, batch):
        if type(self.engine) is SVI and self.step == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(config(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "report.md").exists()
    assert not (tmp_path / "run" / "blob" / "seed-0").exists()
    assert (tmp_path / "run" / "blob" / "seed-0.training").is_dir()
    fits.clear()
    steps = []
    monkeypatch.setattr(TrainingRun, "take_step", lambda self, batch: steps.append(self.step) or step(self, batch))
    resumed = compare(config(), tmp_path / "run", progress=False)
    assert steps == [2, 3], "the steps before the interruption are not repeated, nor are the finished methods"
    assert fits == {"SVI": 1, "Laplace": 1}
    assert metrics(resumed) == metrics(whole)


def test_what_an_estimate_cost_is_part_of_the_cost(config, tmp_path):
    report = compare(config(), tmp_path / "run", progress=False)
    costs = {row.method: row.cost for row in report.rows}
    assert costs["zero-shot"] is None
    assert costs["laplace"].seconds > costs["map"].seconds
    assert costs["laplace"].peak_memory_bytes >= costs["map"].peak_memory_bytes


def test_laplace_alone_fits_its_estimate_once_and_keeps_it(config, tmp_path, fits):
    report = compare(config(methods=("laplace",)), tmp_path / "run", progress=False)
    assert rows(report) == [("zero-shot", 0), ("laplace", 0)]
    assert fits == {"MAP": 1, "Laplace": 1}
    fits.clear()
    compare(config(methods=("map", "laplace")), tmp_path / "run", progress=False)
    assert not fits, "the kept estimate is the row of map"


def test_methods_with_settings_and_seeds_may_be_added(config, tmp_path, fits):
    compare(config(methods=("map",)), tmp_path / "run", progress=False)
    fits.clear()
    more = config(methods=("map", "mean_field"), seeds=2, settings={"mean_field": SHORT})
    report = compare(more, tmp_path / "run", progress=False)
    assert rows(report) == [(name, seed) for seed in (0, 1) for name in ("zero-shot", "map", "mean_field")]
    assert fits == {"MAP": 1, "SVI": 2}
    found = metrics(report)
    assert found["map", 0] != found["map", 1], "another seed is another fit"
    # fewer methods later do not make the folder forget what it holds
    compare(config(methods=("map",)), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"mean_field.steps=4, and now mean_field.steps=5"):
        compare(config(methods=("mean_field",), settings={"mean_field": SHORT | {"steps": 5}}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train_size": 20}, "train_size=24, and now train_size=20"),
        ({"adapter": "LoRA(rank=3)"}, "adapter='LoRA"),
        ({"settings": {"blob": {"kl_weight": 0.5}}}, "blob.kl_weight=0.01, and now blob.kl_weight=0.5"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(config, tmp_path, changes, key, fits):
    compare(config(methods=("blob",)), tmp_path / "run", progress=False)
    fits.clear()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=rf"holds results with {key}"):
        compare(config(methods=("blob",), **changes), tmp_path / "run", progress=False)
    assert not fits
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_prior_guide_and_settings_reach_the_engine(config, tmp_path):
    changes = {
        "prior": "Normal(0, 0.7)",
        "guide": {"*.lora_A": "MeanField(init_scale=0.3)", "*.lora_B": "Point()"},
        "kl_weight": 0.25,
    }
    compare(config(methods=("blob",), settings={"blob": changes}), tmp_path / "run", progress=False)
    kept = json.loads((tmp_path / "run" / "blob" / "seed-0" / "posterior_config.json").read_text())
    assert kept["prior"]["q_proj.lora_A"]["parameters"]["scale"] == pytest.approx(0.7)
    assert kept["guide"]["q_proj.lora_A"] == {"family": "MeanField", "init_scale": 0.3}
    assert kept["guide"]["q_proj.lora_B"]["family"] == "Point"
    assert (kept["record"]["kl_weight"], kept["record"]["steps"], kept["record"]["batch_size"]) == (0.25, 4, 8)


def test_validation_precision_chooses_on_the_validation_split(config, tmp_path, monkeypatch):
    seen = []
    real = Laplace.fit
    monkeypatch.setattr(
        Laplace, "fit", lambda *args, **kwargs: seen.append(kwargs["validation"].name) or real(*args, **kwargs)
    )
    settings = {"laplace": {"precision": "validation"}}
    compare(config(methods=("laplace",), settings=settings), tmp_path / "run", progress=False)
    assert seen == ["validation"]


def test_a_method_may_name_its_kind_of_prediction(config, tmp_path):
    drawn = {"like": "laplace", "kind": "mc"}
    report = compare(config(methods=("laplace", "drawn"), settings={"drawn": drawn}), tmp_path / "run", progress=False)
    assert [(row.method, row.kind) for row in report.rows if row.method != "zero-shot"] == [
        ("laplace", "linearised"), ("drawn", "mc"),
    ]  # fmt: skip


def test_last_layer_laplace_needs_no_estimate(config, tmp_path, monkeypatch):
    # its own MAP fit, of 150 steps by default
    monkeypatch.setattr(MAP, "fit", lambda self, *args, **kwargs: SVI.fit(replace(self, **SHORT), *args, **kwargs))
    report = compare(config(methods=("laplace_last_layer",)), tmp_path / "run", progress=False)
    assert rows(report) == [("zero-shot", 0), ("laplace_last_layer", 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"blob": {"stepz": 3}}}, r"no setting 'stepz'. Did you mean 'steps'"),
        ({"settings": {"blob": {"guide": "BLobb()"}}}, "Did you mean 'BLoB'"),
        ({"settings": {"blob": {"steps": "many"}}}, "'steps' of SVI is a number; got 'many'"),
        ({"settings": {"map": {"guide": "BLoB()"}}, "methods": ("laplace",)}, "points"),
        ({"settings": {"laplace": {"guide": "BLoB()"}}}, "takes no guide"),
        ({"settings": {"blob": {"kind": "mcc"}}}, "Unknown kind of prediction 'mcc'. Did you mean 'mc'"),
        ({"settings": {"laplace": {"estimate": "mapp"}}}, "Unknown method 'mapp'. Did you mean 'map'"),
        ({"settings": {"laplace": {"estimate": "laplace"}}}, "round in a circle: laplace <- laplace"),
        ({"settings": {"blob": {"prior": {"*.lora_C": "Flat()"}}}}, r"'\*.lora_C' matches no site"),
        ({"adapter": "LoRA(rank=99)"}, "Rank 99 exceeds"),
        ({"adapter": "S2FT()"}, r"The method 'blob' does not go .* BLoB makes sites that match '\*lora_A'"),
        (
            {"adapter": "S2FT()", "methods": ("map", "low_rank")},
            r"The method 'low_rank' does not go .* matches no site",
        ),
        ({"adapter": "MixtureLoRA(rank=4)"}, "The method 'zero-shot' does not go .* batch entry 'sequence'"),
        ({"settings": {"blob": {"guide": {"*.lora_A": "BLoB()"}}}}, "The method 'blob' does not go .*lora_B"),
        (
            {"settings": {"blob": {"width": "natural", "guide": "Point()"}}},
            "The method 'blob' .* every site is a point",
        ),
        ({"settings": {"blob": {"estimate": "map"}}}, "The method 'blob' .* SVI starts from no estimate"),
        ({"settings": {"laplace": {"online": 2}}}, "The method 'laplace' .* online=2 moves learned prior scales"),
        ({"schedule": "BlockSchedule(active=9)"}, "The method 'mle' .* 9 blocks are to be active, and the model has 2"),
        (
            {"methods": ("map", "blob_release"), "settings": {"blob_release": {"batch_size": 99}}},
            "24 examples do not fill one batch of 99",
        ),
        ({"ood": ("crowd_tweet",)}, "Did you mean 'crowd_tweets'"),
        ({"train_size": 10_000}, "10000"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path, changes, message, fits):
    with pytest.raises(ValueError, match=message):
        compare(config(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert not fits


@pytest.mark.parametrize("engine", ["SVI", "VBLL", "NUTS"])
def test_an_estimate_or_last_layer_that_is_missing_is_refused_first(config, tmp_path, engine, fits):
    settings = {"mine": {"engine": engine, "prior": "Normal(0, 1)", "adapters": []}}
    settings["mine"] |= {"guide": "BLoB(sites='head.weight')"} if engine == "SVI" else {}
    with pytest.raises(ValueError, match=r"The method 'mine' does not go .*head\.weight"):
        compare(config(methods=("map", "mine"), settings=settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert not fits


def test_a_fit_is_refused_before_anything_is_written(config, tmp_path, fits):
    with pytest.raises(ValueError, match="The method 'blob' does not go"):
        fit_one(config(adapter="S2FT()"), "blob", 0, tmp_path / "blob", progress=False)
    # its estimate is found wanting before it is fitted
    changed = config(settings={"laplace": {"online": 2}})
    with pytest.raises(ValueError, match="The method 'laplace' does not go"):
        fit_one(changed, "laplace", 0, tmp_path / "laplace", progress=False)
    assert not any(tmp_path.iterdir())
    assert not fits


@pytest.mark.parametrize("name", [name for name, method in METHODS_BY_NAME.items() if method.engine != "MetaTuning"])
def test_what_fits_passes_the_check_with_no_step_taken(config, tmp_path, name, monkeypatch):
    monkeypatch.setattr(TrainingRun, "__init__", lambda *args, **kwargs: pytest.fail("a fit was begun"))
    short = config(methods=(name,), settings={name: {}})
    backbone = load_backbone(short.model, dtype="float32")
    before = torch.get_rng_state()
    Cell(short, name, 0, tmp_path / "cell").check(backbone, _task(short))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tmp_path.iterdir())


def test_foreign_items_lie_beside_the_task_s_own_and_are_never_its_own(config, tmp_path):
    rows = [{"question": f"Why {n}?", "choices": ["a", "b"], "answerKey": "0", "id": str(n)} for n in range(400)]
    for folder, first in (("arc_easy", 0), ("arc_challenge", 200)):
        (tmp_path / folder).mkdir()
        for part in ("train", "validation", "test"):
            lines = [json.dumps(row) for row in rows[first : first + 200]]
            (tmp_path / folder / f"{part}.jsonl").write_text("\n".join(lines))
    arc = config(task="arc_easy", data_dir=str(tmp_path), ood=("arc_challenge",), train_size=None, test_size=None)
    data = _task(arc)
    assert {example.id for example in foreign_items("arc_challenge", data, arc.data_dir)} == {
        str(n) for n in range(200, 400)
    }
    inside = replace(arc, data_dir=str(tmp_path / "arc_easy"))
    with pytest.raises(ValueError, match=r"'arc_challenge' are those of 'arc_easy'.*Give the folder above it"):
        foreign_items("arc_challenge", data, inside.data_dir)


class TestFitOne:
    def test_a_finished_fit_is_not_repeated(self, config, tmp_path, fits):
        first = fit_one(config(), "blob", 0, tmp_path / "a" / "blob", progress=False)
        again = fit_one(config(), "blob", 0, tmp_path / "a" / "blob", progress=False)
        assert fits == {"SVI": 1}
        assert first.record["history"] == again.record["history"]
        assert (tmp_path / "a" / "blob" / "config.yaml").is_file()

    @pytest.mark.parametrize(
        ("method", "seed", "changes", "message"),
        [
            ("map", 0, {}, "now method 'map' under seed 0"),
            ("blob", 1, {}, "now method 'blob' under seed 1"),
            ("blob", 0, {"settings": {"blob": {"kl_weight": 0.7}}}, "now blob.kl_weight=0.7"),
        ],
    )
    def test_a_posterior_of_something_else_is_not_passed_off(self, config, tmp_path, method, seed, changes, message):
        fit_one(config(), "blob", 0, tmp_path / "kept", progress=False)
        with pytest.raises(ValueError, match=message):
            fit_one(config(**changes), method, seed, tmp_path / "kept", progress=False)

    def test_an_estimate_leaves_nothing_outside_the_folder(self, config, tmp_path):
        fit_one(config(), "laplace", 0, tmp_path / "deep" / "er" / "kept", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["deep"]
        assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["kept"]

    def test_the_pretrained_model_is_kept_too(self, config, tmp_path):
        fit_one(config(), "zero-shot", 0, tmp_path / "kept", progress=False)
        assert Posterior.from_pretrained(tmp_path / "kept", data_dir=config().data_dir).is_point
