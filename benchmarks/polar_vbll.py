"""LoRA and PoLAR, with and without a Bayesian last layer, on four tasks.

Usage::

    python benchmarks/polar_vbll.py --seeds 3 --out runs/polar_vbll
    python benchmarks/polar_vbll.py --tasks bbc_headlines --seeds 1 --steps 20 --out runs/quick

A task that scores options has no class head: its last-layer methods are left out, and the report says so.
"""

import argparse
from pathlib import Path

from pyrolora.inference.evaluation.experiment import ExperimentConfig, compare
from pyrolora.models.tasks import task

# task -> what is foreign to it
TASKS = {"bbc_headlines": ("crowd_tweets",), "uci_sentiment": ("bbc_headlines",), "arc_easy": ()}
METHODS = (
    "mle", "map", "laplace_last_layer", "vbll_on_map", "vbll", "polar_mle", "polar_vbll_paper", "polar_vbll",
)  # fmt: skip
LAST_LAYER = ("laplace_last_layer", "vbll_on_map", "vbll", "polar_vbll_paper", "polar_vbll")


def main() -> None:
    """Write one report a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train-size", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name in options.tasks.split(","):
        methods = tuple(options.methods.split(","))
        if task(name).format.kind != "label":
            left_out = [method for method in methods if method in LAST_LAYER]
            print(f"{name} scores options: there are no classes for {', '.join(left_out)}, which are left out.")
            methods = tuple(method for method in methods if method not in LAST_LAYER)
        trained = [method for method in methods if method not in ("laplace_last_layer", "vbll_on_map")]
        config = ExperimentConfig(
            model=options.model,
            task=name,
            ood=TASKS.get(name, ()),
            methods=methods,
            train_size=options.train_size,
            seeds=options.seeds,
            device=options.device,
            settings={method: {"steps": options.steps} for method in trained},
        )
        print(f"\n## {name}\n\n{compare(config, options.out / name).to_markdown()}")


if __name__ == "__main__":
    main()
