"""What Bayesian predictions of a last layer cost beside a deterministic one.

Usage::

    python benchmarks/prediction_cost.py --rows 100

Contenders take turns; the ratios of medians are the result. Passes of the network are counted, not assumed.
"""

import argparse
import statistics
import time
from typing import Any

import pyrolora as pl


def main() -> None:
    """Print passes and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    task = pl.task(options.task, train_size=100)
    backbone = pl.load_backbone(options.model, dtype="auto")
    model = pl.BayesianModel(backbone, task, pl.LastLayer(), pl.logit_scale(2.0))
    estimate = pl.MAP(steps=1).iterate(model, task.train).posterior()
    posterior = pl.VBLL().fit(model, task.train, estimate=estimate, progress=False)
    data = model.encode(task.test.subset(options.rows, seed=0))
    kinds: dict[str, dict[str, Any]] = {
        "deterministic": {"kind": "mean"},
        "mf1": {"kind": "linearised_mf1"},
        "256 logit draws": {"kind": "linearised"},
        "1000 weight draws": {"kind": "mc", "draws": 1000},
    }
    passes, forward = [0], backbone.body.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        return forward(*args, **kwargs)

    backbone.body.forward = counted
    times: dict[str, list[float]] = {name: [] for name in kinds}
    runs = {}
    for repeat in range(options.repeats + 1):
        for name, settings in kinds.items():
            passes[0], start = 0, time.perf_counter()
            posterior.predict(data, batch_size=options.rows, **settings)
            runs[name] = passes[0]
            if repeat:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["deterministic"])
    print("| prediction | passes | against deterministic |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {runs[name]} | {statistics.median(values) / base:.3f} |")


if __name__ == "__main__":
    main()
