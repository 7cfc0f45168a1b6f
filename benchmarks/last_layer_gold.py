"""Every last-layer posterior against NUTS on the same frozen features: width, predictions, seconds.

Usage::

    python benchmarks/last_layer_gold.py --task bbc_headlines --train-size 300

Features are the pretrained network's, computed once; every posterior has the same prior.
"""

import argparse
import time

import torch

import pyrolora as pl
from pyrolora.inference.posterior import Posterior


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--test-size", type=int, default=200)
    parser.add_argument("--scale", type=float, default=2.0, help="prior standard deviation of a logit")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--chains", type=int, default=4)
    options = parser.parse_args()
    task = pl.task(options.task, train_size=options.train_size)
    backbone = pl.load_backbone(options.model, dtype="auto")
    model = pl.BayesianModel(backbone, task, pl.LastLayer(), pl.logit_scale(options.scale))
    estimate = pl.MAP(steps=1).iterate(model, task.train).posterior()
    test, folder = task.test.subset(min(options.test_size, len(task.test)), seed=0), "runs/features"
    pl.FeatureCache(folder, 16).features(model, estimate.mean(), task.train, progress=True)
    columns = model.sites["head.weight"].shape[1]
    wide = pl.LowRankPrecision(min(len(task.train), columns))
    engines = {
        "jensen (VBLL)": pl.VBLL(refit="jensen", guide=pl.BlockCovariance(), feature_folder=folder),
        "tilted": pl.VBLL(refit="tilted", guide=wide, feature_folder=folder),
        "tilted, rank 32": pl.VBLL(refit="tilted", guide=pl.LowRankPrecision(32), feature_folder=folder),
        "tilted, diagonal": pl.VBLL(refit="tilted", guide=pl.MeanField(), feature_folder=folder),
        "mc": pl.VBLL(refit="mc", objective_draws=64, guide=wide, feature_folder=folder),
        "bohning": pl.VBLL(refit="bohning", guide=wide, feature_folder=folder),
    }
    fitted: dict[str, Posterior] = {}
    seconds: dict[str, float] = {}
    for name, engine in engines.items():
        start = time.perf_counter()
        fitted[name] = engine.fit(model, task.train, estimate=estimate, progress=False)
        seconds[name] = time.perf_counter() - start
    start = time.perf_counter()
    # Laplace around the optimum of the posterior density, which a long MAP fit finds
    map_head = pl.MAP(steps=400, learning_rate=float(model.prior.scales["head.weight"]) * 0.05, batch_size=64)
    mode = map_head.fit(model, task.train, progress=True)
    fitted["MAP + Laplace, joint"] = pl.Laplace(structure="last_layer", batch_size=16).fit(
        model, task.train, estimate=mode, progress=True
    )
    seconds["MAP + Laplace, joint"] = time.perf_counter() - start
    sampler = pl.NUTS(draws=options.draws, chains=options.chains, feature_folder=folder)
    start = time.perf_counter()
    gold = sampler.fit(model, task.train, estimate=estimate, progress=True)
    seconds["NUTS"] = time.perf_counter() - start
    table = pl.compare_to_gold(gold, fitted, test)
    print(table.to_markdown())
    print(f"\nNUTS: R-hat {gold.record['rhat']:.3f}, effective size {gold.record['ess']:.0f}")
    print("\n| Posterior | Fit (s) | Share of NUTS |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {value / seconds['NUTS']:.3f} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
