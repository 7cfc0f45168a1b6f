"""One Riemannian step against the release's form, which builds an m x m matrix, and its share of a training step.

Usage::

    python benchmarks/riemannian_step.py --rows 4096 --rank 32 --device cuda --out runs/riemannian_step
    python benchmarks/riemannian_step.py --training --device cuda --out runs/riemannian_step    # share of a step of PoLAR

Contenders take turns, so a change of the machine's speed meets all of them: the ratios of medians are the result. The
share is that of the manifold's part (Riemannian gradient, projection, retraction) in whole training steps of PoLAR on
the real model.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import Cells
from device_clock import seconds_of
from torch import Tensor

import pyrolora as pl
from pyrolora.models.stiefel import RETRACTIONS, canonical_gradient, landing_field, tangent_projection, uniform_point


def square_landing(point: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    """The landing field as the release computes it."""
    outer = gradient @ point.mT
    gram = point.mT @ point
    return (outer - outer.mT) @ point + penalty * point @ (gram - torch.eye(gram.shape[-1], device=gram.device))


def polar_by_svd(point: Tensor, tangent: Tensor) -> Tensor:
    """The polar retraction by a singular value decomposition."""
    left, _, right = torch.linalg.svd(point + tangent, full_matrices=False)
    return left @ right


def one_step(cell: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each contender."""
    device = cell["device"]
    torch.manual_seed(0)
    shape = (cell["layers"], cell["rows"], cell["rank"]) if cell["layers"] > 1 else (cell["rows"], cell["rank"])
    point = uniform_point(*shape, device=device)
    gradient = 1e-2 * torch.randn(*shape, device=device)

    def retracted(name: str) -> Callable[[], Tensor]:
        retract = RETRACTIONS[name]

        def step() -> Tensor:
            riemannian = canonical_gradient(point, gradient)
            return retract(point, tangent_projection(point, -riemannian))

        return step

    contenders: dict[str, Callable[[], Tensor]] = {f"retraction {name}": retracted(name) for name in RETRACTIONS}
    contenders["landing, rank x rank"] = lambda: landing_field(point, gradient, 1.0)
    contenders["landing, rows x rows (release)"] = lambda: square_landing(point, gradient, 1.0)
    contenders["polar by SVD"] = lambda: polar_by_svd(point, gradient)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(cell["repeats"] + 1):
        for name, step in contenders.items():
            seconds = seconds_of(step, device)
            if repeat:
                times[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def share_of_training(cell: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of whole steps of PoLAR under two retractions and of LoRA, and of the manifold's part alone."""
    task = pl.task("bbc_headlines", train_size=300)
    backbone = pl.load_backbone(cell["model"], dtype="auto", device=cell["device"])
    common: dict[str, Any] = {"steps": 10_000, "batch_size": 16}
    fits = {
        "PoLAR, polar": (pl.PoLAR(rank=cell["rank"]), pl.MAP(retraction="polar", **common)),
        "PoLAR, cholesky_qr": (pl.PoLAR(rank=cell["rank"]), pl.MAP(retraction="cholesky_qr", **common)),
        "LoRA": (pl.LoRA(rank=cell["rank"]), pl.MAP(**common)),
    }
    runs = {}
    for name, (adapter, engine) in fits.items():
        run = engine.iterate(pl.BayesianModel(backbone, task, adapter), task.train)
        runs[name] = (run, run.data.stream(16, seed=0))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(cell["repeats"] + 2):
        for name, (run, batches) in runs.items():
            batch = next(batches)
            seconds = seconds_of(lambda run=run, batch=batch: run.take_step(batch), cell["device"])
            run.model.release()
            if repeat >= 2:
                times[name].append(seconds)
    found = {f"step of {name}": 1e3 * statistics.median(values) for name, values in times.items()}
    for name, (run, _) in runs.items():
        points = run.guide.parameters_by_role()["manifold"]
        if not points:
            continue
        retract = RETRACTIONS[run.engine.retraction]
        gradients = [1e-2 * torch.randn_like(point) for point in points]

        def part(points: Any = points, gradients: Any = gradients, retract: Any = retract) -> None:
            with torch.no_grad():
                for point, gradient in zip(points, gradients, strict=True):
                    retract(point, tangent_projection(point, -canonical_gradient(point, gradient)))

        part()
        found[f"manifold's part of {name}"] = 1e3 * statistics.median(
            seconds_of(part, cell["device"]) for _ in range(cell["repeats"])
        )
    return found


def main() -> None:
    """Print milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="matrices of a stack")
    parser.add_argument("--training", action="store_true", help="whole training steps instead")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/riemannian_step"))
    options = parser.parse_args()
    cell = {key: value for key, value in vars(options).items() if key != "out"}
    compute = share_of_training if options.training else one_step
    found = Cells(options.out).computed([cell], compute)[0]
    base = found["step of PoLAR, polar" if options.training else "retraction polar"]
    what = f"{options.model}, rank {options.rank}" if options.training else f"{options.rows} x {options.rank}"
    print(f"| {what}, {options.device} | ms | ratio |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3f} | {value / base:.3f} |")


if __name__ == "__main__":
    main()
