"""Grids on a tiny Llama: kill -9, several processes, variants of methods, and the pages made of what they leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import yaml
from typer.testing import CliRunner

from pyrolora.cli import app
from pyrolora.inference.evaluation.cell import Cell
from pyrolora.inference.evaluation.experiment import POLL_SECONDS, UnfinishedCellsError, compare
from pyrolora.inference.evaluation.grid import Grid, folder_name, run_grid
from pyrolora.inference.evaluation.page import read_pages
from pyrolora.inference.evaluation.render import render_folder
from pyrolora.inference.evaluation.report import Report
from pyrolora.inference.svi import SVI

SHORT = {"steps": 4, "batch_size": 8, "learning_rate": 0.02}
METHODS = ["mle", "map", "map+temperature", "blob", "laplace"]
FOLDER = "uci_sentiment/LoRA-rank-2-alpha-4"


@pytest.fixture
def values(tiny_folder, reviews):
    """Values of an experiment file that takes seconds."""
    return {
        "model": str(tiny_folder),
        "tasks": {"uci_sentiment": {"data_dir": str(reviews)}},
        "adapters": ["LoRA(rank=2, alpha=4)"],
        "methods": METHODS,
        "seeds": 2,
        "train_size": 24,
        "test_size": 30,
        "draws": 3,
        "dtype": "float32",
        "miscoverage": 0.2,
        "settings": dict.fromkeys(("mle", "map", "blob"), SHORT),
    }


def figures(folder):
    """Every value of a merged report, without what a fit cost."""
    report = Report.load(folder)
    return {
        (row.method, row.seed): {name: (one.value, one.low, one.high) for name, one in sorted(row.metrics.items())}
        for row in report.rows
    }


def same(one, other):
    return json.dumps(sorted(map(str, one.items()))) == json.dumps(sorted(map(str, other.items())))


def fits_of(output):
    """Cells that a process's log says it fitted."""
    return re.findall(r"^fitting (\S+), seed (\d)", output, flags=re.MULTILINE)


def start(file, out):
    command = [sys.executable, "-m", "pyrolora.cli", "experiment", str(file), "--out", str(out), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


@pytest.fixture
def file(values, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_kill_minus_nine_in_the_middle_changes_nothing(file, values, tmp_path):
    run_grid(Grid.from_dict(values), tmp_path / "whole", progress=False)
    killed, out = start(file, tmp_path / "killed"), tmp_path / "killed" / FOLDER
    deadline = time.monotonic() + 120
    # in the middle of the second seed's cells, which is neither before the first nor after the last
    while not (out / "mle" / "seed-1" / "report.json").is_file():
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    first_fits = fits_of(killed.communicate()[1])
    assert not (out / "report.json").is_file()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/report.json")}
    assert 6 <= len(finished) < 12
    again = start(file, tmp_path / "killed")
    second_fits = fits_of(again.communicate(timeout=240)[1])
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished cells are left as they are"
    kept = {(path.parent.parent.name, path.parent.name[-1]) for path in finished}
    assert not kept & set(second_fits), "no finished cell is fitted again"
    # whatever was being fitted at the kill is the only one that may have been begun twice
    assert len(first_fits) + len(second_fits) - len(set(first_fits) | set(second_fits)) <= 1
    assert same(figures(out), figures(tmp_path / "whole" / FOLDER))
    assert not list(out.rglob(".*")), "no lock and nothing half-written is left"
    assert not list(out.rglob("*.training"))


def test_two_processes_share_a_folder_and_no_cell(file, values, tmp_path):
    together = [start(file, tmp_path / "shared") for _ in range(2)]
    logs = [process.communicate(timeout=300)[1] for process in together]
    assert [process.returncode for process in together] == [0, 0], logs
    fits = [fits_of(log) for log in logs]
    assert not set(fits[0]) & set(fits[1]), "each cell is fitted by one of them"
    assert len(fits[0]) + len(fits[1]) == 2 * len(METHODS)
    run_grid(Grid.from_dict(values), tmp_path / "alone", progress=False)
    assert same(figures(tmp_path / "shared" / FOLDER), figures(tmp_path / "alone" / FOLDER))


def test_a_claimed_cell_is_passed_over_then_waited_for(values, tmp_path, monkeypatch):
    grid = Grid.from_dict({**values, "methods": ["mle", "map"], "seeds": 1})
    config = grid.experiments()[FOLDER]
    held = Cell(config, "mle", 0, tmp_path / FOLDER / "mle" / "seed-0")
    done, slept = [], []
    real = Cell.compute
    monkeypatch.setattr(Cell, "compute", lambda self, *args: done.append(self.name) or real(self, *args))
    holding = held.claim()
    assert holding.__enter__() is True
    with held.claim() as again:
        assert again is False

    def let_go(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            holding.__exit__(None, None, None)

    monkeypatch.setattr("pyrolora.inference.evaluation.experiment.time.sleep", let_go)
    run_grid(grid, tmp_path, progress=False)
    assert done == ["zero-shot", "map", "mle"], "what another process holds comes last"
    assert slept == [POLL_SECONDS] * 2


def test_an_estimate_that_another_process_fits_is_not_fitted_here(values, tmp_path):
    config = Grid.from_dict({**values, "methods": ["laplace"], "seeds": 1}).experiments()[FOLDER]
    root = tmp_path / "run"
    with (
        Cell(config, "map", 0, root / "map" / "seed-0").claim(),
        Cell(config, "laplace", 0, root / "laplace" / "seed-0").claim() as claimed,
    ):
        assert claimed is False
    with Cell(config, "laplace", 0, root / "laplace" / "seed-0").claim() as claimed:
        assert claimed is True


def test_what_a_killed_save_left_is_swept(values, tmp_path):
    grid = Grid.from_dict({**values, "methods": ["mle"], "seeds": 1})
    out = tmp_path / FOLDER / "mle"
    (out / ".seed-0-abc").mkdir(parents=True)
    (out / ".seed-0-abc" / "posterior.safetensors").write_bytes(b"half")
    (out / "seed-0").mkdir()
    (out / "seed-0" / ".report.json.123").write_text('{"for')
    run_grid(grid, tmp_path, progress=False)
    assert [path.name for path in out.iterdir()] == ["seed-0"]
    assert not list((out / "seed-0").glob(".*"))


def test_a_cell_that_fails_does_not_keep_the_others(values, tmp_path, monkeypatch):
    real = SVI.fit

    def fails_once(self, *args, **kwargs):
        if type(self) is SVI:
            raise FloatingPointError("the loss became nan")
        return real(self, *args, **kwargs)

    grid = Grid.from_dict({**values, "methods": ["blob", "mle"], "seeds": 1})
    with monkeypatch.context() as patch:
        patch.setattr(SVI, "fit", fails_once)
        with pytest.raises(UnfinishedCellsError, match=r"1 of 3 cells failed .* blob, seed 0: the loss"):
            run_grid(grid, tmp_path, progress=False)
    assert {method for method, _ in figures(tmp_path / FOLDER)} == {"zero-shot", "mle"}
    page = read_pages(tmp_path)[0]
    assert page.missing == ("blob, seed 0",)
    assert "Not finished: blob, seed 0." in render_folder(tmp_path)["markdown"].read_text()
    run_grid(grid, tmp_path, progress=False)
    assert {method for method, _ in figures(tmp_path / FOLDER)} == {"zero-shot", "mle", "blob"}


def test_a_guide_that_does_not_fit_an_adapter_fails_with_its_cell(values, tmp_path):
    values = {**values, "adapters": ["S2FT()", "LoRA(rank=2)"], "methods": ["blob", "mle"], "seeds": 1}
    with pytest.raises(UnfinishedCellsError, match=r"S2FT: 1 of 3 cells failed .* blob, seed 0: BLoB makes sites"):
        run_grid(Grid.from_dict(values), tmp_path, progress=False)
    assert {method for method, _ in figures(tmp_path / "uci_sentiment" / "S2FT")} == {"zero-shot", "mle"}
    assert {method for method, _ in figures(tmp_path / "uci_sentiment" / "LoRA-rank-2")} == {"zero-shot", "blob", "mle"}


class TestMethods:
    def test_variants_and_crossings_are_methods_of_their_own(self, values):
        settings = {"cold": {"like": "blob", "kl_weight": 0.001}, "blob": SHORT}
        grid = Grid.from_dict({
            **values, "methods": ["cold"], "engines": ["SVI", "MAP"], "guides": ["BLoB()", "MeanField(init_scale=0.1)"],
            "settings": settings,
        })  # fmt: skip
        config = grid.experiments()[FOLDER]
        assert config.methods == ("cold", "SVI-BLoB", "SVI-MeanField-init_scale-0.1", "map")
        assert config.method("cold").settings["kl_weight"] == 0.001
        assert config.method("cold").settings["steps"] == 4, "a variant of the changed method"
        assert config.method("SVI-MeanField-init_scale-0.1").guide == "MeanField(init_scale=0.1)"
        again = type(config).from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict(), "the resolved file says the same"

    def test_tasks_and_adapters_are_crossed(self, values):
        values["tasks"] |= {"bbc_headlines": {"train_size": 50}}
        values["adapters"].append("LoRA(rank=4)")
        found = Grid.from_dict(values).experiments()
        assert list(found) == [
            FOLDER, "uci_sentiment/LoRA-rank-4", "bbc_headlines/LoRA-rank-2-alpha-4", "bbc_headlines/LoRA-rank-4",
        ]  # fmt: skip
        assert found["bbc_headlines/LoRA-rank-4"].train_size == 50
        assert found[FOLDER].train_size == 24
        assert folder_name("LoRA(targets=['q_proj'])") == "LoRA-targets-q_proj"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"taskz": ["a"]}, "Unknown setting 'taskz'. Did you mean 'task'"),
            ({"tasks": []}, "No task to run"),
            ({"task": "uci_sentiment"}, "Both task and tasks"),
            ({"methods": []}, "No method to run"),
            ({"methods": ["blub"]}, "Unknown method 'blub'. Did you mean 'blob'"),
            ({"methods": ["blub+temperature"]}, "Unknown method 'blub'"),
            (
                {"settings": {"mine": {"kl_weight": 1}}},
                "Unknown method 'mine'.*needs settings with engine, or with like",
            ),
            ({"settings": {"mine": {"like": "mine"}}}, "round in a circle: mine <- mine"),
            ({"settings": {"mine": {"engine": "SVY"}}}, "Unknown engine 'SVY'. Did you mean 'SVI'"),
            ({"guides": ["BLoB()"]}, "guides are given without engines"),
            ({"engines": ["SVI"]}, "The engine 'SVI' needs a guide"),
            ({"adapters": ["LoRA()", "LoRA()"]}, "listed twice"),
            ({"methods": 3}, "expected a list of names"),
            ({"miscoverage": 1.5}, "between 0 and 1"),
            ({"shift": ["bbc_headlines"]}, "expected negative, positive"),
        ],
    )
    def test_what_does_not_fit_is_refused_before_anything_is_written(self, values, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            run_grid(Grid.from_dict(values | changes), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


class Links(HTMLParser):
    """Collects everything that a page would fetch, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith(("data:", "#")):
                self.fetched.append(value)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestPages:
    @pytest.fixture(scope="class")
    def folder(self, tiny_folder, reviews, tmp_path_factory):
        """A finished comparison of two seeds with names that HTML and LaTeX must escape."""
        from pyrolora.inference.evaluation.configuration import ExperimentConfig

        out = tmp_path_factory.mktemp("run")
        settings = dict.fromkeys(("mle", "blob"), SHORT) | {"a_b<&>": {"like": "blob", "kl_weight": 1.0}}
        config = ExperimentConfig(
            model=str(tiny_folder), task="uci_sentiment", data_dir=str(reviews), methods=("mle", "blob", "a_b<&>"),
            adapter="LoRA(rank=2)", dtype="float32", train_size=24, test_size=30, draws=3, seeds=2, miscoverage=0.2,
            ood=("crowd_tweets",), ood_size=20, settings=settings,
        )  # fmt: skip
        compare(config, out, progress=False)
        return out

    def test_html_is_one_file_that_fetches_nothing(self, folder, tmp_path):
        html = render_folder(folder, tmp_path)["html"].read_text()
        page = Links()
        page.feed(html)
        assert page.fetched == []
        assert page.open == []
        assert "http" not in re.sub(r"data:[^\"]*", "", html)
        text = " ".join(page.text)
        for part in ("Accuracy", "Selective prediction", "Against mle", "Prediction sets", "a_b<&>", "Cost", "FPR95"):
            assert part in text, part
        assert html.count("data:image/svg+xml;base64,") == 3
        assert "nan" not in text.lower().split()
        assert "undefined for a single draw (zero-shot, mle)" in text

    def test_numbers_are_those_of_the_report(self, folder, tmp_path):
        files = render_folder(folder, tmp_path)
        summary = next(one for one in Report.load(folder).summaries() if one.method == "blob")
        for name in ("accuracy", "nll", "aurc"):
            value = f"{summary.metrics[name].value:.3f}"
            for path in files.values():
                assert value in path.read_text(), (name, path)

    def test_latex_escapes_and_balances(self, folder, tmp_path):
        text = render_folder(folder, tmp_path)["latex"].read_text()
        assert r"a\_b\textless{}\&\textgreater{}" in text
        assert text.count(r"\begin{table}") == text.count(r"\end{table}") >= 6
        body = re.sub(r"\\[&%_#{}$]", "", text)
        assert body.count("{") == body.count("}")
        assert not re.search(r"(?<!\\)%(?! needs)", text.split("\n", 1)[1])
        columns = re.findall(r"\\begin\{tabular\}\{(l r*|l(r*))\}", text)
        assert columns

    def test_comparisons_are_over_items_with_seeds_averaged(self, folder):
        page = read_pages(folder)[0]
        assert page.reference == "mle"
        assert [entry.method for entry in page.comparisons] == ["zero-shot", "blob", "a_b<&>"]
        summaries = {one.method: one for one in page.report.summaries()}
        blob = page.comparisons[1]
        assert blob.seeds == 2
        expected = summaries["blob"].metrics["nll"].value - summaries["mle"].metrics["nll"].value
        assert blob.tests["nll"].difference == pytest.approx(expected, abs=1e-5)
        assert set(page.layers) == {"mle", "blob", "a_b<&>"}

    def test_commands(self, folder, values, tmp_path):
        runner = CliRunner()
        result = runner.invoke(app, ["report", str(folder), "--out", str(tmp_path / "pages")])
        assert result.exit_code == 0, result.output
        assert {path.name for path in (tmp_path / "pages").iterdir()} == {"page.md", "page.tex", "page.html"}
        file = tmp_path / "grid.yaml"
        file.write_text(yaml.safe_dump({**values, "methods": ["mle"], "seeds": 1}))
        result = runner.invoke(
            app, ["experiment", str(file), "--out", str(tmp_path / "grid"), "--quiet", "--set", "draws=2"]
        )
        assert result.exit_code == 0, result.output
        assert (tmp_path / "grid" / "page.html").is_file()

    def test_refusals(self, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match="No folder at"):
            render_folder(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match=r"holds no experiment: there is no config\.yaml"):
            render_folder(tmp_path)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text((folder / "config.yaml").read_text())
        with pytest.raises(ValueError, match=r"No cell of .* is finished"):
            render_folder(tmp_path)
        (tmp_path / "run" / "config.yaml").write_text("methods: [")
        with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
            render_folder(tmp_path)
