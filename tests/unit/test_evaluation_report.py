"""The harness on fake posteriors; oracles: the metrics themselves, scipy's t-interval, the files on disk."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from pyrolora.inference.evaluation import (
    Cost,
    Interval,
    Report,
    calibration_curve,
    evaluate,
    negative_log_likelihood,
    reliability_diagram,
)
from pyrolora.inference.evaluation.aggregate import mean_over_seeds
from pyrolora.inference.evaluation.plots import wilson_interval


@dataclass(frozen=True)
class FakePredictive:
    probs: torch.Tensor
    labels: torch.Tensor | None
    kind: str = "mc"


class FakePosterior:
    """Adds noise to given logits, from the generator that it is handed."""

    def __init__(self, noise=0.5, draws=None, kind="mc"):
        self.noise, self.draws, self.kind, self.calls = noise, draws, kind, []

    def predict(self, data, *, draws=10, kind=None, generator=None, batch_size=64, progress=False):
        logits, labels = data
        self.calls.append((draws, kind, batch_size, progress))
        noise = torch.randn(self.draws or draws, *logits.shape, generator=generator)
        return FakePredictive((logits + self.noise * noise).softmax(-1), labels, self.kind)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(150, 4, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


@pytest.fixture(scope="module")
def foreign():
    return torch.randn(90, 4, generator=torch.Generator().manual_seed(1)), None


@pytest.fixture(scope="module")
def report(data, foreign):
    posteriors = {
        "zero-shot": FakePosterior(0, draws=1, kind="mean"),
        "blob": FakePosterior(),
        "wild": FakePosterior(3),
    }
    return evaluate(
        posteriors,
        data,
        ood={"chem": foreign},
        resamples=100,
        costs={"blob": Cost(12.5, 2**30)},
        progress=False,
    )


def test_rows_hold_what_the_metrics_say(report, data):
    assert [row.method for row in report.rows] == ["zero-shot", "blob", "wild"]
    probs = FakePosterior().predict(data, generator=torch.Generator().manual_seed(0)).probs
    row = report.rows[1]
    assert row.metrics["nll"].value == pytest.approx(float(negative_log_likelihood(probs.mean(0), data[1])), rel=1e-5)
    assert (row.draws, row.examples, row.ood_examples, row.cost) == (10, 150, {"chem": 90}, Cost(12.5, 2**30))
    assert row.metrics["nll"].low < row.metrics["nll"].value < row.metrics["nll"].high
    assert set(row.metrics) == {column.name for column in report.columns}
    assert 0.5 < row.metrics["auroc_entropy/chem"].value < 1


def test_every_posterior_gets_the_same_seed_and_the_arguments(data):
    first, second = FakePosterior(), FakePosterior()
    report = evaluate(
        {"a": first, "b": second},
        data,
        draws=3,
        kind="mc",
        batch_size=7,
        resamples=40,
        seed=5,
        progress=False,
    )
    assert report.rows[0].metrics == report.rows[1].metrics
    assert first.calls == [(3, "mc", 7, False)]
    assert report.rows[0].seed == 5


def test_mutual_information_of_one_draw_is_undefined_not_one_half(report):
    interval = report.rows[0].metrics["auroc_mutual_information/chem"]
    assert math.isnan(interval.value)
    assert interval.note == "undefined for a single draw"
    text = report.to_markdown()
    assert "AUROC mutual information: undefined for a single draw (zero-shot)." in text
    assert "nan" not in text.lower()


def test_markdown_marks_the_best_and_says_what_the_numbers_are(report):
    text = report.to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[:5]] == [
        "Method", "---------", "zero-shot", "blob", "wild",
    ]  # fmt: skip
    assert len({len(line) for line in table[:5]}) == 1
    nll = [line.split("|")[3].strip() for line in table[2:5]]
    best = min(range(3), key=lambda i: report.rows[i].metrics["nll"].value)
    assert [cell.startswith("**") for cell in nll] == [i == best for i in range(3)]
    interval = report.rows[best].metrics["nll"]
    assert nll[best] == f"**{interval.value:.3f}** [{interval.low:.2f}, {interval.high:.2f}]"
    flat = " ".join(text.split())
    for part in (
        "150 test items",
        "90 foreign items of chem",
        "15 bins",
        "seed 0",
        "95% bootstrap over items (100",
    ):
        assert part in flat
    assert "1 draw (mean) for zero-shot, 10 draws (mc) for blob, wild" in flat
    assert "1024" in text


def test_seeds_are_averaged_with_a_t_interval(data):
    reports = [evaluate({"blob": FakePosterior()}, data, resamples=40, seed=s, progress=False) for s in (0, 1, 2)]
    merged = Report.merge(reports)
    values = [r.rows[0].metrics["nll"].value for r in reports]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    found = merged.summaries()[0].metrics["nll"]
    assert (found.value, found.low, found.high) == pytest.approx((sum(values) / 3, low, high), rel=1e-9)
    flat = " ".join(merged.to_markdown().split())
    assert "t-interval across seeds" in flat
    assert "seeds 0, 1, 2" in flat
    assert "bootstrap" not in flat
    table = merged.summaries()[0].calibration["width"]
    assert float(table.count.sum()) == pytest.approx(150)
    mixed = Report.merge([*reports, evaluate({"zero-shot": FakePosterior(0)}, data, resamples=40, progress=False)])
    text = mixed.to_markdown()
    assert "| zero-shot †" in text
    assert "| blob " in text
    assert "† has a single seed" in " ".join(text.split())


def test_mean_over_seeds_edges():
    single = Interval(0.5, 0.4, 0.6)
    assert mean_over_seeds([single]) is single
    undefined = mean_over_seeds([single, Interval.undefined("undefined for a single draw")])
    assert undefined.note == "undefined for a single draw"
    with pytest.raises(ValueError, match="at least one seed"):
        mean_over_seeds([])


def test_merge_refuses_what_does_not_compare(report, data):
    with pytest.raises(ValueError, match="under seed 0 twice"):
        Report.merge([report, report])
    other = evaluate({"a": FakePosterior()}, data, resamples=100, n_bins=10, progress=False)
    with pytest.raises(ValueError, match="report 1 has columns"):
        Report.merge([report, other])
    with pytest.raises(ValueError, match="got none"):
        Report.merge([])


def test_save_and_load_round_trip(report, tmp_path):
    folder = report.save(tmp_path / "deep" / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["reliability.png", "report.json", "report.md"]
    assert Report.load(folder).to_dict() == report.to_dict()
    assert Report.load(folder).to_markdown() == (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_load_explains_a_missing_truncated_or_foreign_file(report, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no report\.json"):
        Report.load(tmp_path)
    path = report.save(tmp_path) / "report.json"
    whole = path.read_text(encoding="utf-8")
    for content, message in (
        (whole[: len(whole) // 2], "not a complete JSON file"),
        ("[]", "expected the object"),
        (json.dumps(json.loads(whole) | {"format": 99}), "format 99"),
        (json.dumps({"format": 2, "rows": []}), "incomplete"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Report.load(tmp_path)


def test_nothing_is_written_when_rendering_fails(report, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no font"):
        report.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_harness_refuses_bad_input(data, foreign):
    logits, _ = data

    class Shuffled(FakePosterior):
        def predict(self, data, **settings):
            found = super().predict(data, **settings)
            return FakePredictive(found.probs, found.labels.flip(0))

    class Diverged(FakePosterior):
        def predict(self, data, **settings):
            found = super().predict(data, **settings)
            found.probs[2, 7] = math.nan
            return found

    for posteriors, settings, message in (
        ({}, {}, "posteriors: got an empty mapping"),
        ({"a": FakePosterior()}, {"draws": 0}, "draws: got 0"),
        ({"blob": FakePosterior()}, {"costs": {"bolb": Cost()}}, "Did you mean 'blob'"),
        ({"a": FakePosterior(), "b": Shuffled()}, {}, "posterior 'b': got labels that differ"),
        ({"a": Diverged()}, {}, "posterior 'a': row 7 of draw 2 holds NaN"),
        (
            {"a": FakePosterior()},
            {"ood": {"far": (logits[:, :3], None)}},
            "posterior 'a' on 'far': got 3 classes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(posteriors, data, resamples=40, progress=False, **settings)
    with pytest.raises(ValueError, match="without labels"):
        evaluate({"a": FakePosterior()}, (logits, None), resamples=40, progress=False)


def test_reliability_diagram_shows_the_metric_that_was_used(report):
    figure, axes = report.reliability_diagram()
    assert [axis.get_title(loc="left") for axis in axes] == ["zero-shot", "blob", "wild"]
    for axis, row in zip(axes, report.rows, strict=True):
        texts = [text.get_text() for text in axis.texts]
        assert f"ECE {row.metrics['ece'].value:.3f}" in texts
        assert "15 bins of equal width" in texts
    assert len(figure.axes) == 6
    _, axes = report.reliability_diagram(strategy="mass")
    assert f"ECE {report.rows[1].metrics['ece_mass'].value:.3f}" in [text.get_text() for text in axes[1].texts]


@pytest.mark.parametrize("methods", [1, 2, 4, 6, 7])
def test_reliability_diagram_of_tables_draws_without_pyplot(data, methods, tmp_path):
    table = calibration_curve(data[0].softmax(-1), data[1])
    figure, axes = reliability_diagram({f"method {i}": table for i in range(methods)})
    figure.savefig(tmp_path / "reliability.png")
    assert axes.shape == (methods,)
    counted = [text.get_text() for text in figure.axes[1].texts]
    assert counted == [f"{count:.0f}" for count in table.count.tolist() if count > 0]


def test_reliability_diagram_of_degenerate_tables(tmp_path):
    same = torch.tensor([[0.3, 0.7]]).expand(5, 2)
    labels = torch.ones(5, dtype=torch.int64)
    for strategy in ("width", "mass"):
        figure, _ = reliability_diagram({"tied": calibration_curve(same, labels, 15, strategy)})
        figure.savefig(tmp_path / "reliability.png")
    with pytest.raises(ValueError, match="got no methods"):
        reliability_diagram({})
    with pytest.raises(ValueError, match="strategy: got 'area'"):
        reliability_diagram({}, strategy="area")


def test_wilson_interval_equals_scipy():
    for right, count in ((0, 3), (3, 3), (17, 40)):
        low, high = wilson_interval(*torch.tensor([right / count, count], dtype=torch.float64))
        oracle = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
        assert (float(low), float(high)) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
