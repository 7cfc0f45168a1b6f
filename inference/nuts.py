"""The gold standard of a last layer: NUTS over cached features."""

import logging
from dataclasses import dataclass, field
from typing import Any

import arviz
import torch
import xarray
from pyro import infer
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.guides import Point, build_guide
from pyrolora.guides.base import Family
from pyrolora.guides.empirical import Empirical
from pyrolora.guides.vbll import LogitMoments
from pyrolora.inference.features import FeatureCache
from pyrolora.inference.last_layer import HeadData, LastLayerHead
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.vbll.natural import GaussianRows, Whitened, optimum, rows_at_prior
from pyrolora.inference.vbll.objectives import Objective
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.program import BayesianModel
from pyrolora.models.randomness import seeded
from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks import EncodedSplit, Split

logger = logging.getLogger(__name__)

# examples whose logits the convergence diagnostics are computed on
DIAGNOSED_ROWS = 40
# of R-hat, beyond which the chains have not met
CONVERGED = 1.01
# of a chain, which an effective sample size takes
FEWEST_DRAWS = 4


@dataclass(frozen=True)
class NUTS:
    """Draws of ``head.weight`` from its exact posterior, with every other site held at an estimate.

    Usage::

        gold = NUTS().fit(model, task.train, estimate=map_posterior)
        gold.record["rhat"], gold.record["ess"]

    The sampler moves in contrasts between classes and in the span of the features only, in coordinates in which Laplace's
    approximation is standard Normal; elsewhere the posterior is the prior and is drawn from it. The target is exact.

    Source: Hoffman and Gelman, "The No-U-Turn Sampler", 2014, in Pyro's implementation.

    Args:
        draws: kept draws of each chain.
        warmup: draws of each chain in which the step size adapts.
        chains: independent chains, run one after another.
        target_accept: mean acceptance probability that the step size aims at.
        seed: seeds chains and draws.
        batch_size: examples at once while features are computed.
        feature_folder: where features are kept; None keeps none.

    Raises:
        ValueError: a number out of range.
    """

    draws: int = field(default=500, metadata={"help": "kept draws of each chain"})
    warmup: int = field(default=200, metadata={"help": "adaptation draws of each chain"})
    chains: int = field(default=4, metadata={"help": "independent chains"})
    target_accept: float = field(default=0.8, metadata={"help": "acceptance probability aimed at"})
    seed: int = field(default=0, metadata={"help": "seed of chains and draws"})
    batch_size: int = field(default=32, metadata={"help": "examples at once"})
    feature_folder: str | None = field(default=None, metadata={"help": "where features are kept"})

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("warmup", "chains", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.draws < FEWEST_DRAWS:
            raise ValueError(
                f"draws must be at least {FEWEST_DRAWS}, or no effective sample size can be told; got {self.draws}. "
                "500 is usual."
            )
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept is a probability between 0 and 1; got {self.target_accept}. Try 0.8.")

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        estimate: Posterior | None = None,
    ) -> Posterior:
        """Sample the last layer.

        Args:
            model: a model with a `LastLayer` under a Normal prior.
            data: training data.
            progress: show bars.
            generator: source of the seed, instead of ``seed``.
            estimate: a posterior whose mean gives every other site, and whose prior scales are kept; None leaves the network
                as it starts.

        Raises:
            ValueError: no `LastLayer`, another prior, or data that no last layer can be fitted to.
        """
        head = LastLayerHead(model)
        head.normal_prior()
        encoded = model.encode(data).require_trainable()
        seed = self.seed if generator is None else int(torch.randint(2**31, (), generator=generator))
        model.place_scales(encoded, None if estimate is None else estimate.model)
        known = model.initial(torch.Generator().manual_seed(seed)) if estimate is None else estimate.mean()
        start = {name: known[name] for name in model.sites if name in known and name != HEAD}
        cache = FeatureCache(self.feature_folder, self.batch_size)
        features = cache.features(model, start, encoded, progress=progress)
        # a leapfrog step is a dozen products of small float64 matrices one after another: no work for an accelerator
        seen = HeadData.of(head, features.values.cpu(), features.labels.cpu())
        white = Whitened.of(seen, *head.normal_prior())
        with seeded(seed):
            coordinates, divergences = self._sample(head, seen, white, progress)
            weights = _weights(white, coordinates)
        families: dict[str, Family] = {name: Point() for name in model.sites}
        families[HEAD] = Empirical(self.draws * self.chains)
        guide = build_guide(families, model, start=start)
        head.factor(guide).set_draws(weights.flatten(0, 1))
        rhat, ess = _diagnose(seen, white, coordinates)
        if rhat > CONVERGED:
            logger.warning("The chains have not met: R-hat %.3f. Take more warmup and draws.", rhat)
        record = {
            **self.to_dict(), "seed": seed, "num_data": len(encoded), "rhat": rhat, "ess": ess,
            "divergences": divergences, "prior_scale": white.scale,
            "estimate": None if estimate is None else estimate.record,
        }  # fmt: skip
        return Posterior(model, guide, record)

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """See `SVI.check`."""
        LastLayerHead(model).normal_prior()

    def _sample(self, head: LastLayerHead, data: HeadData, white: Whitened, progress: bool) -> tuple[Tensor, int]:
        """Whitened rows of every chain, ``(chains, draws, rows, span)``, and the number of divergences."""
        rows, _ = optimum(data, white, head.complete, Objective("tilted"), start=rows_at_prior(head, white))
        target = _Target(head, data, white, rows)
        kept, divergences = [], 0
        for _ in tqdm(range(self.chains), desc="chains", disable=not progress, leave=False):
            kernel = infer.NUTS(
                potential_fn=target.potential, adapt_mass_matrix=False, target_accept_prob=self.target_accept
            )
            start = {"whitened": torch.randn(target.mean.shape).to(target.mean)}
            sampler = infer.MCMC(
                kernel, self.draws, self.warmup, initial_params=start, disable_progbar=not progress, num_chains=1
            )
            sampler.run()
            divergences += sum(len(found) for found in sampler.diagnostics()["divergences"].values())
            kept.append(target.rows(sampler.get_samples()["whitened"]))
        return torch.stack(kept), divergences

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        return {"engine": "NUTS", **vars(self)}


class _Target:
    """The posterior in coordinates where Laplace's approximation of it, contrast by contrast, is standard Normal.

    A shift of all rows changes no probability, so under an isotropic prior the posterior of the rows' common part is its
    prior, independent of everything else: only contrasts between the rows are sampled.
    """

    def __init__(self, head: LastLayerHead, data: HeadData, white: Whitened, rows: GaussianRows) -> None:
        self.head, self.data, self.white = head, data, white
        count = len(rows.mean)
        # an identified head has no common part to leave out
        full = torch.linalg.qr(torch.cat([torch.ones(count, 1), torch.eye(count)[:, 1:]], dim=1)).Q
        turned = torch.eye(count) if head.layer.identified else full
        self.turn = turned.to(rows.mean)
        self.contrasts = self.turn if head.layer.identified else self.turn[:, 1:]
        self.mean = self.contrasts.mT @ rows.mean
        probs = self._logits(rows.mean).softmax(-1)[:, -count:]
        weighted = probs[..., None] * self.contrasts
        curvature = (weighted * self.contrasts).sum(1) - weighted.sum(1).square()
        roots = GaussianRows(self.mean, curvature).roots(white.inputs)
        eye = torch.eye(roots.shape[-1]).to(roots).expand_as(roots)
        self.inverse_roots = torch.linalg.solve_triangular(roots, eye, upper=False)

    def rows(self, position: Tensor) -> Tensor:
        """Whitened rows of sampled positions, the common part drawn from its prior, ``(draws, rows, span)``."""
        contrasts = self._contrasts(position)
        if not self.head.layer.identified:
            common = torch.randn(len(contrasts), 1, contrasts.shape[-1]).to(contrasts)
            contrasts = torch.cat([common, contrasts], dim=1)
        return self.turn @ contrasts

    def potential(self, site: dict[str, Tensor]) -> Tensor:
        """Minus the log density up to a constant, nats."""
        contrasts = self._contrasts(site["whitened"])
        log_probs = self._logits(self.contrasts @ contrasts).log_softmax(-1)
        return 0.5 * contrasts.square().sum() - log_probs.gather(-1, self.data.labels[:, None]).sum()

    def _contrasts(self, position: Tensor) -> Tensor:
        return self.mean + torch.einsum("klm,...kl->...km", self.inverse_roots, position)

    def _logits(self, rows: Tensor) -> Tensor:
        logits = self.white.inputs @ rows.mT + self.white.offset
        return self.head.complete(LogitMoments(logits, torch.zeros_like(logits)), self.data.offset).mean


def _weights(white: Whitened, rows: Tensor) -> Tensor:
    """Weights of whitened rows, with prior draws across the span, ``(chains, draws, rows, columns)``."""
    noise = torch.randn(*rows.shape[:-1], len(white.basis)).to(rows)
    across = noise - (noise @ white.basis) @ white.basis.mT
    return white.loc + white.scale * (rows @ white.basis.mT + across)


def _diagnose(data: HeadData, white: Whitened, rows: Tensor) -> tuple[float, float]:
    """Largest R-hat and least effective size of the logits of some examples."""
    chosen = torch.linspace(0, len(data) - 1, min(DIAGNOSED_ROWS, len(data))).long().to(rows.device)
    logits = torch.einsum("nk,csrk->csnr", white.inputs[chosen], rows)
    values = xarray.Dataset({"logits": (("chain", "draw", "example", "class"), logits.cpu().numpy())})
    # R-hat needs two chains; halves of a single one serve
    if len(rows) == 1:
        half = logits.shape[1] // 2
        split = torch.cat([logits[:, :half], logits[:, half : 2 * half]])
        values = xarray.Dataset({"logits": (("chain", "draw", "example", "class"), split.cpu().numpy())})
    return float(arviz.rhat(values)["logits"].max()), float(arviz.ess(values)["logits"].min())
