"""What Bayesian predictions of a last layer cost beside a deterministic one.

Usage::

    python benchmarks/prediction_cost.py --rows 100 --device cuda --out runs/prediction_cost

Contenders take turns; the ratios of medians are the result. Passes of the network
are counted by runs of its blocks, not assumed.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from cells import Cells
from device_clock import seconds_of

import pyrolora as pl

KINDS: dict[str, dict[str, Any]] = {
    "deterministic": {"kind": "mean"},
    "mf1": {"kind": "linearised_mf1"},
    "256 logit draws": {"kind": "linearised"},
    "1000 weight draws": {"kind": "mc", "draws": 1000},
}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Passes and median seconds of each kind of prediction."""
    task = pl.task(cell["task"], data_dir=cell["data_dir"], train_size=cell["train_size"])
    backbone = pl.load_backbone(cell["model"], dtype="auto", device=cell["device"])
    model = pl.BayesianModel(backbone, task, pl.LastLayer(), pl.logit_scale(2.0))
    estimate = pl.MAP(steps=1).iterate(model, task.train).posterior()
    posterior = pl.VBLL().fit(model, task.train, estimate=estimate, progress=False)
    data = model.encode(task.test.subset(cell["rows"], seed=0))
    runs_of_blocks = [0]

    def count(*_: Any) -> None:
        runs_of_blocks[0] += 1

    # a pass may come in two parts, the trunk below the first adapted block and the rest: blocks tell what was run
    for block in backbone.blocks:
        block.register_forward_pre_hook(count)
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    passes = {}
    for repeat in range(cell["repeats"] + 1):
        for name, settings in KINDS.items():
            runs_of_blocks[0] = 0

            def predict(settings: dict[str, Any] = settings) -> None:
                posterior.predict(data, batch_size=cell["rows"], **settings)

            seconds = seconds_of(predict, cell["device"])
            passes[name] = runs_of_blocks[0] / len(backbone.blocks)
            if repeat:
                times[name].append(seconds)
    return {name: {"passes": passes[name], "seconds": statistics.median(values)} for name, values in times.items()}


def main() -> None:
    """Print passes and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--train-size", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/prediction_cost"))
    options = parser.parse_args()
    cell = {key: value for key, value in vars(options).items() if key != "out"}
    found = Cells(options.out).computed([cell], measure)[0]
    base = found["deterministic"]["seconds"]
    print(f"| {options.rows} rows, {options.device} | passes | ms | against deterministic |\n|---|---|---|---|")
    for name, entry in found.items():
        print(f"| {name} | {entry['passes']:g} | {1e3 * entry['seconds']:.1f} | {entry['seconds'] / base:.3f} |")


if __name__ == "__main__":
    main()
