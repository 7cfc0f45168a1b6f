"""The command line from end to end on a tiny Llama: what each command prints and writes, and how it refuses."""

import json
import logging
import shutil
from importlib.metadata import entry_points

import pytest
import yaml
from matplotlib.figure import Figure
from typer.testing import CliRunner

from pyrolora import cli
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.training import TrainingRun

SHORT = ["--set", "{0}.steps=4", "--set", "{0}.batch_size=8"]


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch):
    """Empty figures; and no log handler is left that writes to the runner's closed stream."""
    monkeypatch.setattr(Report, "reliability_diagram", lambda self: (Figure(), None))
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = handlers, level


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def where(tiny_folder, reviews):
    """Options that say which model and data; every command takes them."""
    return ["--model", tiny_folder, "--task", "uci_sentiment", "--data-dir", reviews]


@pytest.fixture
def small(where):
    """Options of a fit that takes a blink."""
    return [*where, "--train-size", 24, "--dtype", "float32", "--quiet", "--set", "adapter=LoRA(rank=2)"]


def quick(*methods):
    return [option.format(method) for method in methods for option in SHORT]


@pytest.fixture(scope="module")
def kept(tiny_folder, reviews, tmp_path_factory):
    """A BLoB posterior made by ``fit``."""
    folder = tmp_path_factory.mktemp("posteriors") / "blob"
    result = run(
        "fit", "--method", "blob", "--out", folder, "--model", tiny_folder, "--task", "uci_sentiment", "--data-dir",
        reviews, "--train-size", 24, "--dtype", "float32", "--quiet", "--set", "adapter=LoRA(rank=2)", *quick("blob"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


def refused(result, *words):
    """Exit code 2, and one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_the_entry_point_is_this_command_line():
    (script,) = entry_points(group="console_scripts", name="pyrolora")
    assert script.load() is cli.app
    result = run("--help")
    assert result.exit_code == 0
    for command in ("compare", "fit", "evaluate", "predict", "merge", "sites"):
        assert command in result.stdout


class TestCompare:
    def test_it_prints_the_table_that_it_writes(self, small, tmp_path):
        result = run(
            "compare", *small, "--methods", "map,blob", "--seeds", 1, "--draws", 2, "--set", "test_size=20",
            "--out", tmp_path / "run", *quick("map", "blob"),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        table = (tmp_path / "run" / "report.md").read_text()
        assert table.strip() in result.stdout
        assert [row["method"] for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]] == [
            "zero-shot", "map", "blob",
        ]  # fmt: skip

    def test_a_config_file_is_read_and_options_win(self, small, tmp_path):
        file = tmp_path / "run.yaml"
        settings = {"map": {"steps": 9, "learning_rate": 1e-3}}
        file.write_text(yaml.safe_dump({"methods": ["map"], "draws": 7, "test_size": 20, "settings": settings}))
        out = tmp_path / "run"
        result = run(
            "compare", *small, "--config", file, "--draws", 2, "--out", out, "--set", "map.steps=3", "--set",
            "map.learning_rate=2e-3",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        written = yaml.safe_load((out / "config.yaml").read_text())
        assert (written["draws"], written["test_size"], written["methods"]) == (2, 20, ["map"])
        # 2e-3 without a dot is text in YAML 1.1, and a number to everybody else
        assert (written["settings"]["map"]["steps"], written["settings"]["map"]["learning_rate"]) == (3, 0.002)

    @pytest.mark.parametrize(
        ("adapter", "methods", "options"),
        [
            ("pissa", "map,blob,low_rank,laplace_kron", []),
            ("corda", "blob", []),
            ("S2FT(channels=4)", "map,blob", ["--set", "blob.guide=BLoB(sites='*.columns')"]),
            ("full_rank", "map", []),
        ],
    )
    def test_adapters_by_name_under_a_schedule(self, where, tmp_path, adapter, methods, options):
        result = run(
            "compare", *where, "--train-size", 24, "--dtype", "float32", "--quiet", "--methods", methods,
            "--adapter", adapter, "--schedule", "BlockSchedule(active=1, every=2)", *options, "--draws", 2, "--set",
            "test_size=20", "--out", tmp_path / "run", *quick(*[m for m in methods.split(",") if m[:7] != "laplace"]),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert (written["adapter"], written["schedule"]) == (adapter, "BlockSchedule(active=1, every=2)")
        method = methods.split(",")[0]
        made = json.loads((tmp_path / "run" / method / "seed-0" / "posterior_config.json").read_text())
        assert made["record"]["schedule"]["active"] == 1
        assert sum(made["record"]["steps_of_blocks"].values()) == 4

    def test_ctrl_c_gives_130_and_the_same_command_goes_on(self, small, tmp_path, monkeypatch):
        command = ["compare", *small, "--methods", "map", "--set", "test_size=20", *quick("map"), "--out"]
        assert run(*command, tmp_path / "whole").exit_code == 0
        step, steps = TrainingRun.take_step, []

        def interrupted(self, batch):
            if self.step == 2:
                raise KeyboardInterrupt
            return step(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "take_step", interrupted)
            result = run(*command, tmp_path / "run")
        assert result.exit_code == 130
        assert "Run the same command again" in result.stderr
        monkeypatch.setattr(TrainingRun, "take_step", lambda self, batch: steps.append(self.step) or step(self, batch))
        assert run(*command, tmp_path / "run").exit_code == 0
        assert steps == [2, 3]
        first, second = (Report.load(tmp_path / name) for name in ("whole", "run"))
        assert [row.metrics for row in first.rows] == [row.metrics for row in second.rows]


class TestOtherCommands:
    def test_fit_keeps_posterior_and_config(self, kept):
        assert {"posterior_config.json", "posterior.safetensors", "config.yaml"} <= {
            path.name for path in kept.iterdir()
        }
        assert yaml.safe_load((kept / "config.yaml").read_text())["settings"]["blob"]["steps"] == 4

    def test_evaluate_judges_kept_posteriors(self, kept, reviews, tmp_path):
        result = run("evaluate", kept, "--data-dir", reviews, "--draws", 2, "--out", tmp_path / "judged", "--quiet")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "judged" / "report.md").read_text().strip() in result.stdout
        (row,) = Report.load(tmp_path / "judged").rows
        assert (row.method, row.draws, row.examples) == (str(kept), 2, 300)

    def test_a_kind_of_prediction_and_foreign_tasks_of_the_same_folder(self, kept, reviews, tmp_path):
        (amazon,) = reviews.glob("amazon*")
        shutil.copy(amazon, tmp_path / amazon.name)
        yelp = tmp_path / amazon.name.replace("amazon", "yelp")
        yelp.write_text(amazon.read_text().replace('"text": "', '"text": "you '))
        flags = ("--data-dir", tmp_path, "--kind", "flipout", "--draws", 2, "--quiet")
        result = run("evaluate", kept, *flags, "--ood", "uci_sentiment_yelp", "--out", tmp_path / "judged")
        assert result.exit_code == 0, result.output
        (row,) = Report.load(tmp_path / "judged").rows
        assert row.kind == "flipout"
        assert "uci_sentiment_yelp" in result.stdout
        shutil.copy(amazon, yelp)
        same = run("evaluate", kept, *flags, "--ood", "uci_sentiment_yelp")
        refused(same, "'uci_sentiment_yelp' are those of 'uci_sentiment'")
        plain, token = (
            run("predict", kept, "a sad case", "--data-dir", reviews, "--kind", kind).stdout
            for kind in ("mean", "token")
        )
        assert json.loads(plain)["probability"] != json.loads(token)["probability"]
        wrong = run("predict", kept, "a sad case", "--data-dir", reviews, "--kind", "flip")
        refused(wrong, "has no prediction of kind 'flip'. Did you mean 'flipout'?")

    def test_a_posterior_over_a_language_model_is_not_merged(self, kept, reviews, tmp_path):
        refused(
            run("merge", kept, "--data-dir", reviews, "--out", tmp_path / "merged"),
            "reads text. Use merged(model, draw)",
        )
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("how", ["arguments", "standard input"])
    def test_predict_prints_one_json_object_a_line(self, kept, reviews, how):
        texts = ["i love this phone", "a sad case"]
        given = texts if how == "arguments" else []
        stdin = None if how == "arguments" else "\n".join([texts[0], "", texts[1], ""])
        result = run("predict", kept, *given, "--data-dir", reviews, "--draws", 3, stdin=stdin)
        assert result.exit_code == 0, result.output
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert [entry["text"] for entry in found] == texts
        for entry in found:
            assert set(entry["probability"]) == {"negative", "positive"}
            assert sum(entry["probability"].values()) == pytest.approx(1, abs=2e-4)
            assert entry["label"] == max(entry["probability"], key=entry["probability"].get)
            assert 0 <= entry["mutual_information_nats"] <= entry["entropy_nats"] <= 0.6932
        assert run("predict", kept, *texts, "--data-dir", reviews, "--draws", 3).stdout == result.stdout

    def test_predict_without_text_is_refused(self, kept, reviews):
        refused(run("predict", kept, "--data-dir", reviews, stdin="\n\n"), "no text to classify")

    def test_sites_shows_the_table(self, where):
        result = run("sites", *where, "--adapter", "LoRA(rank=2)", "--prior", "Normal(0, 0.1)")
        assert result.exit_code == 0, result.output
        assert "q_proj.lora_A" in result.stdout
        assert "(2, 2, 32)" in result.stdout
        assert "layer, rank, in_feature" in result.stdout
        assert "Normal(loc=0, scale=0.1)" in result.stdout


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--methods", "bolb"], ["Unknown method 'bolb'", "Did you mean 'blob'"]),
            (["--task", "uci_sentimant"], ["uci_sentimant", "Did you mean 'uci_sentiment'"]),
            (["--model", "smollm2-135n"], ["Unknown model 'smollm2-135n'", "Did you mean 'smollm2-135m'"]),
            (["--set", "adapter=LoRA(targets=['q_prj'])"], ["'q_prj'", "Did you mean 'q_proj'"]),
            (["--set", "adapter=LoRAs()"], ["Did you mean 'LoRA'"]),
            (["--adapter", "pisa"], ["Unknown adapter 'pisa'. Did you mean 'PiSSA'"]),
            (["--schedule", "BlockSchedule(active=0)"], ["active must be at least 1; got 0"]),
            (["--schedule", "lisa"], ["Unknown schedule 'lisa'. Did you mean 'BlockSchedule'"]),
            (["--set", "adapter=LoRA(rank=0)"], ["at least 1; got 0"]),
            (["--set", "adapter=LoRA(rank=40)"], ["Rank 40 exceeds", "Choose a rank of at most"]),
            (["--set", "map.prior={'*.lora_Q': Flat()}"], ["'*.lora_Q'", "lora_"]),
            (["--set", "map.prior=Norml(0, 1)"], ["Did you mean 'Normal'"]),
            (["--set", "map.stepz=3"], ["'stepz'", "Did you mean 'steps'"]),
            (["--set", "map.steps=0"], ["steps must be at least 1; got 0"]),
            (["--set", "map.steps=ten"], ["is a number; got 'ten'"]),
            (["--set", "trian_size=3"], ["'trian_size'", "Did you mean 'train_size'"]),
            (["--set", "map.steps=2.5"], ["'steps' of MAP is a whole number; got 2.5. Give 2"]),
            (["--set", "map.batch_size=4.5"], ["'batch_size' of MAP is a whole number; got 4.5. Give 4"]),
            (["--set", "map.learning_rate=.inf"], ["'learning_rate' of MAP is a finite number; got inf"]),
            (["--set", "adapter=LoRA(alpha=1e999)"], ["'alpha' of LoRA is a finite number; got inf"]),
            (["--device", "gpu"], ["Unknown device 'gpu'", "An NVIDIA GPU is 'cuda'"]),
            (["--device", "cuda:77"], ["The device 'cuda:77' cannot be used on this machine"]),
            (["--set", "draws"], ["expected key=value"]),
            (["--set", "draws=[1"], ["is not a value in YAML"]),
            (["--set", "draws=0"], ["draws is a whole number of at least 1; got 0"]),
            (["--config", "no-such.yaml"], ["No config file at 'no-such.yaml'"]),
            (["--data-dir", "no-such-folder"], ["'no-such-folder' is not a folder"]),
        ],
        ids=lambda value: " ".join(value) if value and str(value[0]).startswith("--") else "",
    )  # fmt: skip
    def test_compare_says_what_is_wrong_and_writes_nothing(self, small, tmp_path, options, words):
        result = run("compare", *small, "--methods", "map", *options, "--out", tmp_path / "run")
        refused(result, *words)
        assert not (tmp_path / "run").exists()

    def test_a_prior_that_names_no_site(self, where):
        refused(run("sites", *where, "--adapter", "LoRA(targets=['query'])"), "'query'", "q_proj")

    @pytest.mark.parametrize("command", ["predict", "evaluate"])
    def test_a_posterior_that_is_not_there(self, kept, reviews, command, monkeypatch):
        monkeypatch.setattr(cli, "load_backbone", lambda *args, **kwargs: pytest.fail("a model was loaded for nothing"))
        rest = ["text"] if command == "predict" else []
        result = run(command, kept.with_name("blop"), *rest, "--data-dir", reviews)
        refused(result, "No posterior at", "Did you mean", str(kept))

    def test_a_damaged_posterior(self, kept, reviews, tmp_path):
        (tmp_path / "posterior_config.json").write_text((kept / "posterior_config.json").read_text()[:50])
        refused(run("predict", tmp_path, "text", "--data-dir", reviews), "is damaged")

    def test_a_fit_over_somebody_elses_folder(self, small, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        refused(run("fit", "--method", "map", *small, *quick("map"), "--out", tmp_path), "is no posterior")
        assert (tmp_path / "notes.txt").read_text() == "mine"


def test_pictures_and_a_joined_task(tmp_path):
    from PIL import Image
    from transformers import AutoModelForImageClassification

    from pyrolora.models.tasks import task
    from pyrolora.models.vision.loading import tiny_vit

    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
    }
    tiny_vit(**small, patch_size=4).save_pretrained(tmp_path / "vit")
    digits = task("digits")
    for number, example in enumerate(digits.test.examples[:40]):
        place = tmp_path / "own" / str(number % 2) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example.pixels()).save(place)
    # the pictures come from the folder of the task, the digits from their package
    out, own = tmp_path / "run", ("--data-dir", tmp_path / "own")
    done = run(
        "compare", "--model", tmp_path / "vit", "--task", "digits+image_folder", *own, "--ood", "image_folder",
        "--adapter", "MoEfiedLoRA(rank=2, experts=4)", "--methods", "map", "--train-size", "40",
        "--dtype", "float32", "--out", out, "--quiet", "--set", "test_size=30", "--set", "map.steps=4",
        "--set", "map.retaining=QualityRetaining()",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Accuracy of each task over the whole label space" in done.output
    assert "Telling image_folder from the test items" in done.output
    picture, kept = tmp_path / "own" / "0" / "0.png", out / "map" / "seed-0"
    found = run("predict", kept, picture, *own)
    assert found.exit_code == 0, found.output
    line = json.loads(found.stdout.strip().splitlines()[-1])
    assert line["file"] == str(picture)
    assert sum(line["probability"].values()) == pytest.approx(1, abs=1e-2)
    missing = run("predict", kept, "no.png", *own)
    assert missing.exit_code == 2
    merged = run("merge", kept, *own, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert tuple(network.config.id2label.values()) == tuple(line["probability"])
    assert "No picture at 'no.png'" in missing.output
