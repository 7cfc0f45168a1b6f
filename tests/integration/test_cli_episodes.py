"""Few-shot episodes from the command line: members fitted, put together, and judged; mistakes in one sentence."""

import json
import logging

import pytest
from typer.testing import CliRunner

from pyrolora.cli import app

TASK = "digits:3w1s2q"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members and their pool."""
    root = tmp_path_factory.mktemp("episodes")
    for method, setting in (("meta_tuning", "steps=1"), ("amt", "attack=PyramidPGD(0.001)")):
        run("fit", "--method", method, "--model", "tiny-vit", "--task", TASK, "--set", f"{method}.steps=1", "--set",
            f"{method}.{setting}", "--out", root / method, "--quiet")  # fmt: skip
    run("pool", root / "meta_tuning", root / "amt", "--out", root / "pool")
    return root


def run(*arguments, code=0):
    # no log handler may be left that writes to the runner's closed stream
    handlers, level = logging.root.handlers[:], logging.root.level
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    logging.root.handlers[:], logging.root.level = handlers, level
    assert result.exit_code == code, result.output
    return result


def test_members_and_pools_are_judged_on_any_domain(folders):
    judged = run(
        "episodes", folders / "amt", folders / "pool", "--episodes", 3, "--attack", "PGD(0.05, steps=2)", "--semantics",
        "mixture", "--merge", "MergeRule(top=1)", "--quiet",
    )  # fmt: skip
    member, pool = (json.loads(line) for line in judged.stdout.splitlines() if line.startswith("{"))
    assert 0 <= member["robust_accuracy"] <= member["accuracy"] <= 1
    assert "weight_0" not in member
    assert pool["weight_0"] + pool["weight_1"] == pytest.approx(1)
    assert pool["task"] == TASK


def test_every_knob_of_merging_has_an_option(folders):
    def judged(*options):
        found = run("episodes", folders / "pool", "--episodes", 3, "--quiet", *options)
        return json.loads(next(line for line in found.stdout.splitlines() if line[0] == "{"))

    plain = judged()
    assert judged("--trim", "Trim(0.5)")["nll"] != plain["nll"]
    assert judged("--score", "PGD(0.3)")["weight_0"] != plain["weight_0"]
    assert judged("--copies", 3)["weight_0"] != plain["weight_0"]
    drawn = [judged("--semantics", "dirichlet", "--concentration", value)["nll"] for value in (0.1, 1e4)]
    assert abs(drawn[1] - plain["nll"]) < abs(drawn[0] - plain["nll"])


def test_the_fits_settings_are_kept_as_declared(folders):
    record = json.loads((folders / "amt" / "posterior_config.json").read_text())["record"]
    assert record["attack"]["attack"] == "PyramidPGD"
    assert record["attack"]["epsilon"] == 0.001
    assert record["perturbation"] == {"mode": "awp", "size": 0.001}


def test_shots_are_those_that_were_asked_for(folders):
    given = [
        run("episodes", folders / "amt", "--task", f"digits:3w{shots}s2q", "--episodes", 40, "--quiet")
        for shots in (1, 5)
    ]
    one, five = (json.loads(next(line for line in one.stdout.splitlines() if line[0] == "{")) for one in given)
    assert five["nll"] < one["nll"]


def test_a_single_picture_is_told_where_to_go(folders):
    result = run("predict", folders / "amt", "one.png", code=2)
    assert "give a split of task('digits:3w1s2q'), or judge the posterior with 'pyrolora episodes'" in result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--attack", "PGD(-0.1)"], "in [0, 1]; got -0.1"),
        (["--attack", "PDG(0.1)"], "Did you mean 'PGD'"),
        (["--task", "digits"], "Name the task 'digits:3w1s'"),
        (["--task", "digits:3w2s2q", "--semantics", "mena"], "Did you mean 'mean'"),
        (["--task", "digits:4w1s2q"], "episodes of 4 classes and 8 queries"),
        (["--episodes", "0"], "ask for 6 to 3600"),
        (["--draws", "0"], "at least 1 draw; got draws=0"),
        (["--attack", "PGD(0.1, stepsize=0.1)"], "PGD has no 'stepsize'. Did you mean 'step_size'"),
    ],
)
def test_mistakes_are_one_sentence(folders, arguments, reason):
    result = run("episodes", folders / "pool", "--quiet", *arguments, code=2)
    assert reason in result.output
    assert "Traceback" not in result.output
