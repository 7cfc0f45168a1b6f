"""Balanced clusters: groups of equal size whose members point in similar directions."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ITERATIONS = 30
# changes of cost below this are none
ROUNDING = 1e-12


def balanced_clusters(rows: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Cluster of each row, all clusters equally large: ``balanced_clusters(fc1.weight, 16)``.

    Rows are compared by direction. Each assignment is the best one that is balanced; assignments and centroids alternate
    until nothing moves. The first is an assignment problem in which every centroid stands as often as its cluster has
    members, the others start from the one before, see `reassigned`.

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
    # both have unit length or less: the nearest centroid by angle is that of the largest product
    _, seats = linear_sum_assignment(np.repeat(-(points @ centroids.T), count // clusters, axis=1))
    found = seats // (count // clusters)
    for _ in range(ITERATIONS):
        centroids = np.stack([points[found == cluster].mean(0) for cluster in range(clusters)])
        assigned = reassigned(-(points @ centroids.T), found)
        if (assigned == found).all():
            break
        found = assigned
    return torch.tensor(found, dtype=torch.int64)


def reassigned(cost: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The assignment of least cost with the cluster sizes of a given one: ``reassigned(-points @ centroids.T, labels)``.

    Rows move in cycles of clusters, one row an edge, as long as a cycle lowers the cost; when none does, no assignment of
    these sizes is cheaper (Klein, 1967). From a start that is nearly right this takes a few moves, where solving the
    assignment anew takes as long as the first time.

    Args:
        cost: of each row in each cluster.
        labels: where to start.

    Shape:
        cost ``(count, clusters)``; labels and result ``(count,)``
    """
    labels, clusters = labels.copy(), cost.shape[1]
    change = np.empty((clusters, clusters))
    mover = np.empty((clusters, clusters), dtype=int)
    stale = list(range(clusters))
    while True:
        for source in stale:
            members = np.flatnonzero(labels == source)
            moves = cost[members] - cost[members, source][:, None]
            best = moves.argmin(0)
            change[source], mover[source] = moves[best, np.arange(clusters)], members[best]
            change[source, source] = np.inf
        cycle = _negative_cycle(change)
        if not cycle:
            return labels
        for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            labels[mover[source, target]] = target
        stale = cycle


def _negative_cycle(change: np.ndarray) -> list[int]:
    """Clusters along a cycle of negative total change, or none (Bellman and Ford from all at once)."""
    clusters = len(change)
    distance, before = np.zeros(clusters), np.full(clusters, -1)
    for _ in range(clusters):
        through = distance[:, None] + change
        best = through.argmin(0)
        shorter = through[best, np.arange(clusters)]
        nearer = shorter < distance - ROUNDING
        if not nearer.any():
            return []
        distance, before = np.where(nearer, shorter, distance), np.where(nearer, best, before)
    # whatever still moved hangs on a cycle: as many steps back as there are clusters end on it
    place = int(np.flatnonzero(nearer)[0])
    for _ in range(clusters):
        place = int(before[place])
    cycle = [place]
    while (last := int(before[cycle[-1]])) != place:
        cycle.append(last)
    return cycle[::-1]


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
