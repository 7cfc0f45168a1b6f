"""One Riemannian step against the release's form, which builds an m x m matrix, and against a whole training step.

Usage::

    python benchmarks/riemannian_step.py --rows 4096 --rank 32

Contenders take turns, so a change of the machine's speed meets all of them: the ratios of medians are the result.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyrolora.models.stiefel import RETRACTIONS, canonical_gradient, landing_field, tangent_projection, uniform_point


def square_landing(point: Tensor, gradient: Tensor, penalty: float) -> Tensor:
    """The landing field as the release computes it."""
    outer = gradient @ point.mT
    gram = point.mT @ point
    return (outer - outer.mT) @ point + penalty * point @ (gram - torch.eye(gram.shape[-1]))


def polar_by_svd(point: Tensor, tangent: Tensor) -> Tensor:
    """The polar retraction by a singular value decomposition."""
    left, _, right = torch.linalg.svd(point + tangent, full_matrices=False)
    return left @ right


def main() -> None:
    """Print milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    point = uniform_point(options.rows, options.rank)
    gradient = 1e-2 * torch.randn(options.rows, options.rank)

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
    for repeat in range(options.repeats + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["retraction polar"])
    print(f"| {options.rows} x {options.rank} | ms | against retraction polar |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {1e3 * statistics.median(values):.2f} | {statistics.median(values) / base:.2f} |")


if __name__ == "__main__":
    main()
