"""Balanced clusters: groups of equal size whose members point in similar directions."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ITERATIONS = 30


def balanced_clusters(rows: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster of each row, all clusters equally large: ``balanced_clusters(fc1.weight, 16)``.

    Rows are compared by direction. Each assignment is the best one that is balanced, an assignment problem in which every
    centroid stands as often as its cluster has members; assignments and centroids alternate until nothing moves.

    Source: Bradley, Bennett and Demiriz, "Constrained k-means clustering", 2000, with equal sizes.

    Args:
        rows: vectors to group.
        clusters: how many groups; it must divide the number of rows.
        seed: of the first centroids, chosen far apart from one another (k-means++).

    Shape:
        rows ``(count, features)``; returns ``(count,)`` int64, on the CPU.

    Raises:
        ValueError: the clusters do not divide the rows.
    """
    count = len(rows)
    if clusters < 1 or count % clusters:
        raise ValueError(
            f"{clusters} clusters do not divide {count} rows; choose one of {', '.join(map(str, _divisors(count)))}."
        )
    points = torch.nn.functional.normalize(rows.detach().double().cpu(), dim=1).numpy()
    centroids = _far_apart(points, clusters, np.random.default_rng(seed))
    size, found = count // clusters, np.full(count, -1)
    for _ in range(ITERATIONS):
        # both have unit length or less: the nearest centroid by angle is that of the largest product
        _, seats = linear_sum_assignment(np.repeat(-(points @ centroids.T), size, axis=1))
        assigned = seats // size
        if (assigned == found).all():
            break
        found = assigned
        centroids = np.stack([points[found == cluster].mean(0) for cluster in range(clusters)])
    return torch.tensor(found, dtype=torch.int64)


def _far_apart(points: np.ndarray, clusters: int, chance: np.random.Generator) -> np.ndarray:
    chosen = [int(chance.integers(len(points)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < clusters:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        total = distance.sum()
        weights = distance / total if total > 0 else None
        chosen.append(int(chance.choice(len(points), p=weights)))
    return points[chosen]


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, min(count, 256) + 1) if count % divisor == 0]
