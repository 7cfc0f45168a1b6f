"""The sections of a report beyond its test items, on fake posteriors; oracles: the functions that they gather."""

import math
from dataclasses import dataclass

import pytest
import torch

from pyrolora.inference.evaluation import (
    Report,
    average_precision,
    classification_metrics,
    conformalise,
    decompose,
    energy_score,
    evaluate,
    rank_correlation,
)
from pyrolora.inference.predictive import Predictive, RowPrediction


@dataclass
class Known:
    """Logits with a draw of noise each; data are pairs of logits and labels."""

    noise: float = 0.5
    draws: int = 6

    def predict(self, data, *, draws=10, kind=None, generator=None, batch_size=64, progress=False):
        logits, labels = data
        noisy = logits + self.noise * torch.randn(self.draws, *logits.shape, generator=generator)
        made = RowPrediction.from_logits(noisy)
        return Predictive(made.probs, "mc", labels, made.energy)


def labelled(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(examples, 3, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@pytest.fixture(scope="module")
def data():
    return {name: labelled(120, seed) for seed, name in enumerate(("test", "shift", "calibration", "foreign"))}


@pytest.fixture(scope="module")
def report(data):
    people = torch.rand(120, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return evaluate(
        {"one": Known(), "point": Known(noise=0, draws=1)},
        data["test"],
        ood={"chem": (data["foreign"][0] / 4, None)},
        shift={"films": data["shift"]},
        calibration=data["calibration"],
        miscoverage=0.2,
        disagreement=people,
        resamples=60,
        progress=False,
    )


def predicted(data):
    return Known().predict(data, generator=torch.Generator().manual_seed(0))


def test_every_section_holds_what_its_functions_say(report, data):
    metrics = report.rows[0].metrics
    familiar, foreign = predicted(data["test"]), predicted((data["foreign"][0] / 4, None))
    split = decompose(familiar.probs)
    assert metrics["entropy_total"].value == pytest.approx(float(split.total.mean()))
    assert metrics["entropy_epistemic"].value == pytest.approx(float(split.epistemic.mean()))
    total = metrics["entropy_aleatoric"].value + metrics["entropy_epistemic"].value
    assert metrics["entropy_total"].value == pytest.approx(total)
    expected = float(average_precision(energy_score(familiar), energy_score(foreign)))
    assert metrics["aupr_energy/chem"].value == pytest.approx(expected)
    shifted = predicted(data["shift"])
    for name in ("accuracy", "nll", "brier", "ece"):
        expected = float(classification_metrics()[name].function(shifted.mean_probs, data["shift"][1]))
        assert metrics[f"{name}/films"].value == pytest.approx(expected, abs=1e-5)
    held_out = predicted(data["calibration"])
    for score in ("split", "aps"):
        conformal = conformalise(held_out.mean_probs, data["calibration"][1], miscoverage=0.2, score=score)
        quality = conformal.judge(familiar.mean_probs, data["test"][1])
        assert metrics[f"set_coverage_{score}"].value == pytest.approx(quality.coverage)
        assert metrics[f"set_size_{score}"].value == pytest.approx(quality.mean_size)
    people = torch.rand(120, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert metrics["human_disagreement"].value == pytest.approx(rank_correlation(split.aleatoric, people).value)
    assert set(metrics) == {column.name for column in report.columns}
    assert all(one.low <= one.high for one in metrics.values() if one.defined)


def test_the_page_has_every_section_and_no_nan(report, tmp_path):
    text = report.to_markdown()
    headings = [
        "Selective prediction",
        "Calibration of every class",
        "Uncertainty of a test item",
        "Telling chem from the test items (AUPR)",
        "Telling chem from the test items (FPR95)",
        "Shifted to films",
        "Prediction sets that promise 80% coverage",
        "Agreement with human disagreement",
    ]
    for heading in headings:
        assert heading in text, heading
    assert "nan" not in text.lower()
    assert "120 shifted items of films" in " ".join(text.split())
    assert math.isnan(report.rows[1].metrics["entropy_epistemic"].value)
    assert "Epistemic: undefined for a single draw (point)." in text
    # coverage has a promise to keep, no best
    coverage = next(line for line in text.splitlines() if "Coverage, split" in line)
    assert "**" not in text[text.index(coverage) :].split("\n### ")[0].splitlines()[2].split("|")[2]
    report.save(tmp_path)
    assert Report.load(tmp_path).to_dict() == report.to_dict()


def test_refusals(data):
    test = data["test"]
    with pytest.raises(ValueError, match="which ood has as well"):
        evaluate({"a": Known()}, test, ood={"x": test}, shift={"x": test}, progress=False)
    with pytest.raises(ValueError, match="on 'films': got predictions without labels"):
        evaluate({"a": Known()}, test, shift={"films": (test[0], None)}, resamples=40, progress=False)
    other = (test[0][:, :2], test[1].clamp(max=1))
    with pytest.raises(ValueError, match="on 'films': got 2 classes, expected 3"):
        evaluate({"a": Known()}, test, shift={"films": other}, resamples=40, progress=False)
    with pytest.raises(ValueError, match="miscoverage: got 1"):
        evaluate({"a": Known()}, test, calibration=test, miscoverage=1, resamples=40, progress=False)
    with pytest.raises(ValueError, match="in the same order"):
        evaluate({"a": Known()}, test, disagreement=torch.ones(4), resamples=40, progress=False)
