"""Every last-layer posterior against NUTS on the same frozen features: width, predictions, seconds.

Usage::

    python benchmarks/last_layer_gold.py --task bbc_headlines --train-size 300 --seeds 3 --device cuda --out runs/gold

Features are the pretrained network's, computed once; every posterior has the same prior. NUTS is one cell and what it is
compared with another, kept in the folder and not computed again. NUTS and the fits of the head run in float64; only the
features need the device.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from device_clock import seconds_of

import pyrolora as pl
from pyrolora.inference.posterior import Posterior


def measure(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All posteriors of one seed against NUTS."""
    task = pl.task(cell["task"], data_dir=cell["data_dir"], train_size=cell["train_size"], seed=cell["seed"])
    backbone = pl.load_backbone(cell["model"], dtype="auto", device=cell["device"])
    model = pl.BayesianModel(backbone, task, pl.LastLayer(), pl.logit_scale(cell["scale"]))
    estimate = pl.MAP(steps=1).iterate(model, task.train).posterior()
    test, features = task.test.subset(min(cell["test_size"], len(task.test)), seed=0), str(folder / "features")
    pl.FeatureCache(features, 16).features(model, estimate.mean(), task.train, progress=True)
    columns = model.sites["head.weight"].shape[1]
    wide = pl.LowRankPrecision(min(len(task.train), columns))
    draws = {"objective_draws": 64, "feature_folder": features}
    engines = {
        "jensen (VBLL)": pl.VBLL(refit="jensen", guide=pl.BlockCovariance(), feature_folder=features),
        "tilted": pl.VBLL(refit="tilted", guide=wide, feature_folder=features),
        "tilted, rank 32": pl.VBLL(refit="tilted", guide=pl.LowRankPrecision(32), feature_folder=features),
        "tilted, diagonal": pl.VBLL(refit="tilted", guide=pl.MeanField(), feature_folder=features),
        "mc": pl.VBLL(refit="mc", guide=wide, **draws),
        "mc, contrasts": pl.VBLL(
            objective="tilted", refit="mc", guide=pl.ClassContrasts(), **{**draws, "objective_draws": 256}
        ),
        "bohning": pl.VBLL(refit="bohning", guide=wide, feature_folder=features),
    }
    fitted: dict[str, Posterior] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, fit: Callable[[], Posterior]) -> Posterior:
        kept: list[Posterior] = []
        seconds[name] = seconds_of(lambda: kept.append(fit()), cell["device"])
        return kept[0]

    for name, engine in engines.items():
        fitted[name] = timed(
            name, lambda engine=engine: engine.fit(model, task.train, estimate=estimate, progress=False)
        )

    def laplace() -> Posterior:
        # around the optimum of the posterior density, which a long MAP fit finds
        rate = float(model.prior.scales["head.weight"]) * 0.05
        mode = pl.MAP(steps=cell["map_steps"], learning_rate=rate, batch_size=64).fit(model, task.train)
        return pl.Laplace(structure="last_layer", batch_size=16).fit(model, task.train, estimate=mode)

    fitted["MAP + Laplace, joint"] = timed("MAP + Laplace, joint", laplace)
    sampler = pl.NUTS(draws=cell["draws"], warmup=cell["warmup"], chains=cell["chains"], feature_folder=features)
    gold = timed("NUTS", lambda: sampler.fit(model, task.train, estimate=estimate))
    table = pl.compare_to_gold(gold, fitted, test)
    rows = {
        row.name: {"ratio": row.variance_ratio, "kl": row.kl, "distance": row.total_variation} for row in table.rows
    }
    record = {key: gold.record[key] for key in ("rhat", "ess", "divergences")} | {"noise": table.noise}
    return {"rows": rows, "seconds": seconds, "nuts": record}


def main() -> None:
    """Print a table for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="bbc_headlines")
    parser.add_argument("--data-dir")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--test-size", type=int, default=200)
    parser.add_argument("--scale", type=float, default=2.0, help="prior standard deviation of a logit")
    parser.add_argument("--map-steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/last_layer_gold"))
    options = parser.parse_args()
    torch.manual_seed(0)
    shared = {key: value for key, value in vars(options).items() if key not in ("out", "seeds")}
    cells = [{**shared, "seed": seed} for seed in range(options.seeds)]
    for seed, found in enumerate(Cells(options.out).computed(cells, lambda cell: measure(cell, options.out))):
        nuts = found["nuts"]
        print(f"\nSeed {seed}. NUTS: R-hat {nuts['rhat']:.3f}, effective size {nuts['ess']:.0f}, ", end="")
        print(f"divergences {nuts['divergences']}, {found['seconds']['NUTS']:.0f} s, ", end="")
        print(f"of each KL {nuts['noise']:.5f} is its noise\n")
        print("| posterior | variance ratio | KL from gold (nats) | total variation | fit (s) | share of NUTS |")
        print("|---|---|---|---|---|---|")
        for name, row in found["rows"].items():
            took = found["seconds"][name]
            share = took / found["seconds"]["NUTS"]
            print(
                f"| {name} | {row['ratio']:.2f} | {row['kl']:.5f} | {row['distance']:.4f} | {took:.1f} | {share:.3f} |"
            )


if __name__ == "__main__":
    main()
