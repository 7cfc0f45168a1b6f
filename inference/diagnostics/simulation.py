"""Simulation-based calibration: fit what is known to be true, many times, and see where the truth ranks."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.engine import Engine
from pyrolora.inference.predictive import log_likelihood
from pyrolora.models.program import BayesianModel
from pyrolora.models.randomness import seeded
from pyrolora.models.tasks import EncodedSplit, Split
from pyrolora.models.trunk import TrunkCache

# simulated ranks behind a p-value and a band
NULL_SIMULATIONS = 4000

Simulate = Callable[[torch.Generator], tuple[Tensor, Any]]
Fit = Callable[[Any, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class SimulationBasedCalibration:
    """Ranks of true values among posterior draws, uniform if the posterior is right on average over the prior.

    Attributes:
        names: of the quantities.
        ranks: how many draws lie below the truth, ``(simulations, quantities)``.
        draws: independent draws that each truth was ranked among.
        seed: of the random numbers that spread whole ranks over the unit interval.
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    seed: int = 0

    @property
    def uniform(self) -> Tensor:
        """Ranks spread evenly over the unit interval, ``(simulations, quantities)``: exactly uniform if all is right."""
        generator = torch.Generator().manual_seed(self.seed)
        spread = torch.rand(self.ranks.shape, generator=generator, dtype=torch.float64)
        return (self.ranks.double() + spread) / (self.draws + 1)

    def p_values(self) -> dict[str, float]:
        """Name -> p-value of uniform ranks, by the simultaneous band of their distribution function.

        Saeilynoja, Buerkner and Vehtari 2022, "Graphical test for discrete uniformity", algorithm 1.
        """
        null = _null_gammas(len(self.ranks), self.seed)
        found = {}
        for column, name in enumerate(self.names):
            gamma = _gamma(self.uniform[:, column].numpy()[None])[0]
            found[name] = float((1 + (null <= gamma).sum()) / (1 + len(null)))
        return found

    def passes(self, level: float = 0.05) -> bool:
        """Whether no quantity is rejected at a level shared by all of them (Holm)."""
        ordered = sorted(self.p_values().values())
        return all(p > level / (len(ordered) - place) for place, p in enumerate(ordered))

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points in 0..1 and the ends of the band that holds a whole uniform distribution function with this probability."""
        simulations = len(self.ranks)
        gamma = float(np.quantile(_null_gammas(simulations, self.seed), 1 - level))
        points = _points(simulations)
        low = stats.binom.ppf(gamma / 2, simulations, points) / simulations
        high = stats.binom.ppf(1 - gamma / 2, simulations, points) / simulations
        return points, low, high


def simulation_based_calibration(
    simulate: Simulate,
    fit: Fit,
    *,
    simulations: int = 200,
    names: tuple[str, ...] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SimulationBasedCalibration:
    """Rank the truth of many simulated data sets among the posterior draws fitted to each.

    ``simulation_based_calibration(simulate, fit, simulations=200).p_values()``

    A posterior that is too narrow gives ranks at both ends, one that is too wide ranks in the middle, a biased one slopes.

    Args:
        simulate: ``generator -> (true values (quantities,), data)``, from the prior and the likelihood.
        fit: ``(data, generator) -> independent draws (draws, quantities)``; thin a Markov chain.
        simulations: number of data sets.
        names: of the quantities.
        seed: of everything.
        progress: show a bar.

    Raises:
        ValueError: fewer than 20 simulations, draws of another number of quantities, or one that is not finite.

    Talts et al. 2018, "Validating Bayesian inference algorithms with simulation-based calibration", algorithm 1.
    """
    if simulations < 20:
        raise ValueError(
            f"simulations: got {simulations}, expected at least 20; 200 tell a scale that is wrong by a quarter."
        )
    generator = torch.Generator().manual_seed(seed)
    ranks, sizes = [], set()
    for index in tqdm(range(simulations), desc="calibration", disable=not progress, leave=False):
        truth, data = simulate(generator)
        drawn = fit(data, generator)
        if drawn.ndim != 2 or truth.shape != drawn.shape[1:]:
            raise ValueError(
                f"fit: got draws of shape {tuple(drawn.shape)} for {tuple(truth.shape)} true values, expected "
                "(draws, quantities)."
            )
        if not (drawn.isfinite().all() and truth.isfinite().all()):
            raise ValueError(f"fit: simulation {index} gave a value that is not finite; look at its fit.")
        # a truth that equals some draws, as a constant does, ranks anywhere among them
        equal = (drawn == truth).sum(0)
        spread = (torch.rand(equal.shape, generator=generator) * (equal + 1)).long()
        ranks.append((drawn < truth).sum(0) + spread)
        sizes.add(len(drawn))
    if len(sizes) > 1:
        raise ValueError(f"fit: got {sorted(sizes)} draws, expected the same number every time.")
    names = tuple(f"quantity {i}" for i in range(ranks[0].numel())) if names is None else tuple(names)
    if len(names) != ranks[0].numel():
        raise ValueError(f"names: got {len(names)}, expected one for each of the {ranks[0].numel()} quantities.")
    return SimulationBasedCalibration(names, torch.stack(ranks), sizes.pop(), seed)


@dataclass(frozen=True, eq=False, kw_only=True)
class SimulatedSplit(EncodedSplit):
    """Rows whose labels came from the model: all of one class is then a draw like another, not a mistake in the data.

    Leaving such draws out would make ranks non-uniform under the true posterior.

    Args:
        original: the rows with their own labels.
        trunks: hidden states below the lowest adapted block, which are the same in every simulation.
    """

    original: EncodedSplit
    trunks: TrunkCache

    @classmethod
    def of(cls, original: EncodedSplit, labels: Tensor, trunks: TrunkCache) -> "SimulatedSplit":
        """The rows of any encoded split under other labels."""
        same = {entry.name: getattr(original, entry.name) for entry in dataclasses.fields(EncodedSplit)}
        return cls(**{**same, "labels": labels}, original=original, trunks=trunks)

    def batch(self, positions: list[int], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """See `EncodedSplit.batch`; with the trunk."""
        batch = self.trunks.attach(self.original.batch(positions, device))
        return {**batch, "labels": self.labels[positions].to(device)}

    def require_trainable(self) -> "EncodedSplit":
        """The split itself: see `EncodedSplit.require_trainable`."""
        return self


def calibrate_engine(
    engine: Engine,
    model: BayesianModel,
    data: Split | EncodedSplit,
    *,
    quantities: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] | None = None,
    simulations: int = 100,
    draws: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> SimulationBasedCalibration:
    """Simulation-based calibration of an engine with its guide: weights from the prior, labels from the model, then a fit.

    ``calibrate_engine(SVI(guide=FullCovariance(), steps=300), model, task.train.subset(60)).p_values()``

    Every simulation is a fit, so this is for small models: a last layer, or a tiny backbone. Truths come from the prior as it
    is declared; an engine that learns prior scales is judged with that, and need not pass even if it is right given them.

    Args:
        engine: what is judged.
        model: with priors that can be sampled.
        data: rows whose texts are kept and whose labels are replaced.
        quantities: name -> function of ``{site: (draws, *shape)}`` that returns ``(draws,)``; by default the mean square of
            every site, and the log-likelihood of the data, which sees a posterior that has not looked at them.
        simulations: number of data sets.
        draws: posterior draws that each truth is ranked among.
        seed: of everything.
        progress: show a bar.

    Raises:
        ValueError: see `simulation_based_calibration`; also an improper prior.
    """
    trunks = TrunkCache(model.backbone, model.first_block, len(data))
    given = model.encode(data)
    encoded = SimulatedSplit.of(given, given.labels, trunks)
    improper = [name for name, entry in model.prior.to_dict().items() if entry["prior"] == "Flat"]
    if improper:
        raise ValueError(
            f"The prior of {improper[0]!r} is Flat() and cannot be sampled. Declare a proper one, such as Normal."
        )

    def simulate(generator: torch.Generator) -> tuple[Tensor, EncodedSplit]:
        seed = int(torch.randint(2**62, (), generator=generator))
        # the last fit has moved learned scales, and the truth is to come from the declared ones
        model.place_scales(given)
        with seeded(seed, model.backbone.device), torch.no_grad():
            traced = poutine.trace(model.sample_sites).get_trace()
            nodes: Any = traced.nodes
            truth: dict[str, Tensor] = {name: nodes[name]["value"] for name in model.sites}
            labels = torch.empty_like(given.labels)
            for batch in encoded.batches(64):
                unlabelled = {key: value for key, value in batch.items() if key != "labels"}
                labels[batch["index"]] = poutine.condition(model, data=truth)(unlabelled).cpu()
        model.release()
        simulated = SimulatedSplit.of(given, labels, trunks)
        return _measure({name: value[None] for name, value in truth.items()}, simulated)[0], simulated

    def fit(simulated: EncodedSplit, generator: torch.Generator) -> Tensor:
        posterior = engine.fit(model, simulated, progress=False, generator=generator)
        return _measure(posterior.sample(draws, generator=generator), simulated)

    def _measure(draw: Mapping[str, Tensor], simulated: EncodedSplit) -> Tensor:
        if quantities is not None:
            values = [quantity(draw) for quantity in quantities.values()]
        else:
            values = [draw[name].flatten(1).square().mean(1) for name in model.sites]
            values.append(log_likelihood(model, simulated, draw).sum(1))
        return torch.stack([value.detach().double().cpu() for value in values], 1)

    names = (
        tuple(quantities)
        if quantities is not None
        else (*(f"{name} squared" for name in model.sites), "log likelihood")
    )
    return simulation_based_calibration(
        simulate, fit, simulations=simulations, names=names, seed=seed, progress=progress
    )


def _points(simulations: int) -> np.ndarray:
    return np.arange(1, min(simulations, 100)) / min(simulations, 100)


def _gamma(values: np.ndarray) -> np.ndarray:
    """Smallest two-sided binomial probability over all points of each distribution function, ``(functions,)``."""
    simulations = values.shape[1]
    points = _points(simulations)
    below = np.stack([np.searchsorted(np.sort(row), points, side="right") for row in values])
    low = stats.binom.cdf(below, simulations, points)
    high = stats.binom.sf(below - 1, simulations, points)
    return 2 * np.minimum(low, high).min(1)


def _null_gammas(simulations: int, seed: int) -> np.ndarray:
    return _gamma(np.random.default_rng(seed).random((NULL_SIMULATIONS, simulations)))
