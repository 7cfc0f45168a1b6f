"""LoRA and PoLAR, with and without a Bayesian last layer, on four tasks.

Usage::

    python benchmarks/polar_vbll.py --data-dir data --seeds 3 --device cuda --out runs/polar_vbll
    python benchmarks/polar_vbll.py --tasks bbc_headlines --seeds 1 --steps 20 --out runs/quick

``--data-dir`` holds the folders of the tasks that come with no package (uci_sentiment, clinc150, arc_easy). Each task is one
comparison in a folder of its own below ``--out``; every method and seed is a cell that one process claims and none repeats.
Last-layer Laplace is dense, but for clinc150 Kronecker-factored.
A task that scores options has no class head: its last-layer methods are left out, and the report says so.
"""

import argparse
from pathlib import Path

import pyrolora as pl
from pyrolora.inference.evaluation.experiment import ExperimentConfig, compare
from pyrolora.inference.evaluation.methods import INSIDE, WIDE

# task -> what is foreign to it, and what is the same question elsewhere
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "bbc_headlines": {"ood": ("crowd_tweets",)},
    "uci_sentiment": {"ood": ("bbc_headlines",), "shift": ("uci_sentiment_yelp", "uci_sentiment_imdb")},
    "clinc150": {"ood": ("clinc150_oos",)},
    "arc_easy": {},
}
METHODS = (
    "mle", "map", "laplace_last_layer", "vbll_on_map", "vbll", "polar_mle", "polar_vbll_paper", "polar_vbll",
)  # fmt: skip
LAST_LAYER = ("laplace_last_layer", "vbll_on_map", "vbll", "polar_vbll_paper", "polar_vbll")
# what Laplace's starts from, named so that its length can be set as that of the others
HEAD_MAP = {
    "like": "map",
    "adapters": ["LastLayer()"],
    "prior": {INSIDE: WIDE, "head.weight": "Normal(0, 0.1)"},
}
# a dense covariance over 20 classes of SmolLM2's features would have 11,520 rows; Kronecker factors take its place
MANY_CLASSES = {"clinc150": {"structure": "kron", "sites": "head.weight"}}
WITHOUT_STEPS = ("laplace_last_layer", "vbll_on_map")


def main() -> None:
    """Write one report a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--test-size", type=int, default=None)
    parser.add_argument("--ood-size", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in options.tasks.split(","):
        methods = tuple(options.methods.split(","))
        data_dir = None if name in ("bbc_headlines", "crowd_tweets") else options.data_dir
        if pl.task(name, data_dir=data_dir).format.kind != "label":
            left_out = [method for method in methods if method in LAST_LAYER]
            print(f"{name} scores options: there are no classes for {', '.join(left_out)}, which are left out.")
            methods = tuple(method for method in methods if method not in LAST_LAYER)
        steps = {"steps": options.steps}
        settings = {method: dict(steps) for method in (*methods, "map") if method not in WITHOUT_STEPS}
        if "laplace_last_layer" in methods:
            settings["map_last_layer"] = {**HEAD_MAP, **steps}
            settings["laplace_last_layer"] = {"estimate": "map_last_layer", **MANY_CLASSES.get(name, {})}
        config = ExperimentConfig(
            model=options.model,
            task=name,
            data_dir=data_dir,
            methods=methods,
            train_size=options.train_size,
            test_size=options.test_size,
            ood_size=options.ood_size,
            seeds=options.seeds,
            device=options.device,
            settings=settings,
            **TASKS.get(name, {}),
        )
        print(f"\n## {name}\n\n{compare(config, options.out / name).to_markdown()}")


if __name__ == "__main__":
    main()
