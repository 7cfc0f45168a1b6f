"""The optimisation loop behind `SVI` and `MAP`: per-example ELBO, seeded steps, checkpoints."""

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyrolora.guides.base import ROLES
from pyrolora.inference import checkpoint
from pyrolora.inference.assembly import assemble
from pyrolora.inference.digests import data_digest, tensor_digest
from pyrolora.inference.elbo import AnalyticELBO
from pyrolora.inference.engine import History, StepStats
from pyrolora.inference.noise import TOKEN_SCOPES, NoiseMessenger, TemperMessenger, TokenMessenger
from pyrolora.inference.optimiser import GuideAdam
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.retaining import QUALITY, LogitBank, QualityRetaining, RetainingMessenger
from pyrolora.inference.riemannian import RiemannianStep
from pyrolora.inference.schedules import BlockPlan
from pyrolora.models.active_entries import ActiveEntries
from pyrolora.models.adapters.base import PROGRESS
from pyrolora.models.likelihoods import ADVERSARIAL, LABEL
from pyrolora.models.program import BayesianModel
from pyrolora.models.randomness import seeded
from pyrolora.models.stiefel import project
from pyrolora.models.tasks import EncodedSplit, Split, independent_rows
from pyrolora.models.trunk import TrunkCache

if TYPE_CHECKING:
    from pyrolora.inference.svi import SVI

logger = logging.getLogger(__name__)

# terms of the loss that are no divergence of a site
OBSERVED = (LABEL, QUALITY, ADVERSARIAL)


class TrainingRun:
    """The state of one fit: guide, optimiser, step number and history.

    Args:
        engine: the settings.
        model: the model.
        data: training data.
        generator: source of the seed, instead of the engine's.
        start: site name -> where its mean starts.
    """

    def __init__(
        self,
        engine: "SVI",
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.engine, self.model = engine, model
        self.data = model.encode(data)
        self.data.require_trainable()
        self.data_digest = data_digest(self.data)
        self.seed = engine.seed if generator is None else int(torch.randint(2**31, (), generator=generator))
        # a fit before this one may have moved the learned scales, from which guides start
        model.place_scales(self.data)
        parts = assemble(engine, model, len(self.data), seed=self.seed, start=start)
        self.guide, self.widths, self.noisy_sites = parts.guide, parts.widths, parts.noisy_sites
        manifold_step = RiemannianStep((), engine.manifold_step, engine.retraction, engine.landing_penalty)
        left_out = self.widths.left_out if self.widths is not None else ()
        self.optimiser = self._make_optimiser(parts.plan, manifold_step, left_out)
        self.parameters: list[Tensor] = list(self.optimiser.parameters)
        self.elbo = AnalyticELBO(num_particles=engine.particles)
        groups = getattr(model.task.format, "group_of_class", torch.zeros(model.classes or 0, dtype=torch.int64))
        self.bank = None if engine.retaining is None else self._bank(engine.retaining, groups)
        self.trunks = TrunkCache(model.backbone, model.first_block, len(self.data))
        self.step = 0
        self.history: History = []
        self.averages: list[Tensor] = []
        # an engine that sets learned prior scales by other means turns this off
        self.learns_scales = True
        self.consistent = True
        if engine.checkpoint is not None and checkpoint.exists(engine.checkpoint):
            checkpoint.restore(self, engine.checkpoint)
            logger.info("Resuming at step %d from %s", self.step, engine.checkpoint)

    def _make_optimiser(
        self, plan: BlockPlan | None, manifold_step: RiemannianStep, left_out: Collection[str]
    ) -> GuideAdam:
        return GuideAdam(self.guide, self._rates(), plan, manifold_step, left_out)

    def _bank(self, settings: QualityRetaining, group_of_class: Tensor) -> LogitBank:
        if not len(group_of_class):
            raise ValueError(
                f"The task {self.model.task.name!r} scores options, which are no classes to retain. Leave retaining out, or "
                "use a task whose labels are classes."
            )
        backbone = self.model.backbone
        return LogitBank(settings, group_of_class, backbone.device, backbone.site_dtype)

    def _rates(self) -> dict[str, float]:
        """Peak learning rates, as `GuideAdam` takes them."""
        return {**dict.fromkeys(ROLES, self.engine.learning_rate), "scale": self.engine.scale_learning_rate}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run for resuming to make sense."""
        sites = {name: list(site.shape) for name, site in self.model.sites.items()}
        settings = {key: value for key, value in self.engine.to_dict().items() if key != "checkpoint_every"}
        return {
            "settings": settings,
            "seed": self.seed,
            "sites": sites,
            "adapters": [adapter.to_dict() for adapter in self.model.adapters],
            "constants": tensor_digest(self.model.constants),
            "prior": self.model.prior.to_dict(),
            "site_families": {name: factor.family.to_dict() for name, factor in self.guide.items()},
            "backbone": self.model.backbone.fingerprint,
            "dtype": str(self.model.backbone.dtype),
            "data": self.data_digest,
        }

    def __iter__(self) -> Iterator[StepStats]:
        """Run the remaining steps, one an item."""
        return self.steps()

    def steps(self, progress: bool = False) -> Iterator[StepStats]:
        """Run the remaining steps, one an item, writing checkpoints on the way and on interruption."""
        engine = self.engine
        self._refill_trunks()
        batches = self._stream(self.step)
        bar = tqdm(
            total=engine.steps, initial=self.step, desc=type(engine).__name__.lower(), disable=not progress, leave=False
        )
        running: dict[str, float] = {}
        try:
            while self.step < engine.steps:
                stats = self.take_step(self.trunks.attach(next(batches)))
                for key in ("nll", "kl"):
                    running[key] = 0.95 * running.get(key, getattr(stats, key)) + 0.05 * getattr(stats, key)
                bar.update()
                bar.set_postfix(nll=f"{running['nll']:.3f}", kl=f"{running['kl']:.3f}", refresh=False)
                if engine.checkpoint is not None and self.step % engine.checkpoint_every == 0:
                    checkpoint.write(self, engine.checkpoint)
                yield stats
        except KeyboardInterrupt:
            # inside an update some parameters have moved and others not: the last checkpoint on disk is then the good one
            if engine.checkpoint is not None and self.consistent:
                checkpoint.write(self, engine.checkpoint)
                logger.warning("Interrupted after step %d; state kept in %s", self.step, engine.checkpoint)
            raise
        finally:
            bar.close()
            self.model.release()

    def _stream(self, start: int) -> Iterator[dict[str, Tensor]]:
        """Batches from a step on, without end."""
        return self.data.stream(self.engine.batch_size, seed=self.seed, start=start)

    def _refill_trunks(self) -> None:
        """Cache what the steps before a resume had cached, in their batches.

        Padding and the number of rows decide how matrix products round: a trunk computed in another batch would make the
        resumed fit end a few bits away from an uninterrupted one.
        """
        if self.model.first_block > 0:
            done = min(self.step, self.data.steps_per_epoch(self.engine.batch_size))
            for batch in islice(self._stream(0), done):
                self.trunks.attach(batch)

    def take_step(self, batch: Mapping[str, Tensor]) -> StepStats:
        """One optimisation step on a batch, which becomes part of the history.

        Raises:
            FloatingPointError: loss or gradient is not finite.
        """
        engine = self.engine
        if PROGRESS in self.model.context_keys:
            batch = {**batch, PROGRESS: torch.tensor(self.step / engine.steps)}
        entries = self.optimiser.activate(self.step)
        self.optimiser.zero_grad()
        resting = nullcontext() if entries is None else ActiveEntries(entries)
        with self._seeded_step(), pyro.validation_enabled(False), resting:
            loss = self._backward(batch)
        grads = self.optimiser.gradients()
        norm = float(nn.utils.get_total_norm(grads))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._describe_failure(loss, norm))
        if engine.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.optimiser.trained, engine.max_grad_norm, torch.tensor(norm))
        self.consistent = False
        self.optimiser.step(self._rate_factor(self.step))
        self.step += 1
        if self.widths is not None:
            self.widths.step(self.step)
        if self.learns_scales:
            self._update_scales()
        if self.bank is not None:
            self.bank.update()
        self._average()
        nll = self.elbo.terms["label"]
        kl = sum(value for name, value in self.elbo.terms.items() if name not in OBSERVED) / engine.kl_weight
        figures: dict[str, Any] = self.model.diagnostics(self.guide.mean(), batch)
        figures |= {"retained": self.elbo.terms.get(QUALITY), "adversarial": self.elbo.terms.get(ADVERSARIAL)}
        stats = StepStats(self.step, loss, nll, kl, norm, **figures)
        self.history.append(stats)
        self.consistent = True
        return stats

    def _update_scales(self) -> None:
        """Move the learned prior scales whose turn it is to their optimum for the guide as it is."""
        prior, progress = self.model.prior, self.step / self.engine.steps
        if due := prior.due_scales(progress, self.step):
            prior.update_scales(self.guide.second_moments(due), progress, self.step)

    @torch.no_grad()
    def _average(self) -> None:
        """Add the parameters to their running mean once the last part of the run has begun (Polyak and Juditsky, 1992)."""
        seen = self.step - round((1 - self.engine.average) * self.engine.steps)
        if seen == 1:
            self.averages = [parameter.detach().clone() for parameter in self.parameters]
        elif seen > 1:
            torch._foreach_lerp_(self.averages, self.parameters, 1 / seen)

    def _backward(self, batch: Mapping[str, Tensor]) -> float:
        """Loss of a batch in nats per example, its gradients in place and its terms in ``self.elbo``."""
        program = self.model.__call__ if self.bank is None else RetainingMessenger(self.bank)(self.model.__call__)
        run_model, run_guide = self._scoped(program, batch), self._scoped(self.guide.__call__, batch)
        return self.elbo.loss_and_grads(run_model, run_guide, batch, len(self.data))

    def _scoped(self, program: Callable[..., Any], batch: Mapping[str, Tensor]) -> Callable[..., Any]:
        """A model or guide under this fit's temperature and noise."""
        scopes: list[Messenger] = [TemperMessenger(len(self.data), self.engine.kl_weight)]
        if self.engine.noise == "example" and self.noisy_sites:
            scopes.append(NoiseMessenger(self.noisy_sites, independent_rows(batch)))
        elif self.engine.noise in TOKEN_SCOPES and self.noisy_sites:
            scopes.append(TokenMessenger(self.noisy_sites, self.engine.noise))
        for scope in scopes:
            program = scope(program)
        return program

    def _rate_factor(self, step: int) -> float:
        """Linear rise over the warm-up, then linear fall that would reach zero after the last step."""
        rising = max(1, round(self.engine.warmup * self.engine.steps))
        if step < rising:
            return (step + 1) / rising
        return (self.engine.steps - step) / max(1, self.engine.steps - rising)

    @contextmanager
    def _seeded_step(self) -> Iterator[None]:
        """Draws that depend on the seed and the step alone, and leave the user's random state as it was."""
        mixed = hashlib.sha256(f"{self.seed}:{self.step}".encode()).digest()
        with seeded(int.from_bytes(mixed[:7], "big"), self.model.backbone.device):
            yield

    def _describe_failure(self, loss: float, norm: float) -> str:
        # from cause to effect: one bad parameter or KL makes the gradients of every other site bad as well
        parameters = [name for name, factor in self.guide.items() if not _finite(factor.parameters())]
        divergences = [
            name for name, value in self.elbo.terms.items() if name not in OBSERVED and not math.isfinite(value)
        ]
        likelihood = not all(math.isfinite(self.elbo.terms.get(name, 0.0)) for name in OBSERVED)
        gradients = [
            name
            for name, factor in self.guide.items()
            if not _finite(p.grad for p in factor.parameters() if p.grad is not None)
        ]
        guilty = parameters or divergences or ([] if likelihood else gradients)
        where = f"the site {guilty[0]!r}" if guilty else "the likelihood (no site holds a non-finite value)"
        folder = self.engine.checkpoint
        kept = "" if folder is None or not checkpoint.exists(folder) else f" The last good state is in {folder}."
        return (
            f"The loss became {loss} (gradient norm {norm}) at step {self.step + 1}, first in {where}.{kept} "
            "Lower learning_rate or scale_learning_rate, or clip with max_grad_norm=1.0."
        )

    def posterior(self) -> Posterior:
        """The posterior as fitted so far, independent of further steps."""
        record = {
            **self.engine.to_dict(),
            "seed": self.seed,
            "num_data": len(self.data),
            "steps_done": self.step,
            "history": [stats.to_dict() for stats in self.history],
        }
        if self.optimiser.plan is not None:
            record["steps_of_blocks"] = self.optimiser.plan.visits(self.step)
            record["peak_optimiser_bytes"] = self.optimiser.peak_state_bytes
        guide = copy.deepcopy(self.guide)
        if self.averages:
            averages = dict(zip(map(id, self.parameters), self.averages, strict=True))
            with torch.no_grad():
                for mine, copied in zip(self.guide.parameters(), guide.parameters(), strict=True):
                    copied.copy_(averages[id(mine)])
                # a mean of orthonormal factors is none
                for point in guide.parameters_by_role()["manifold"]:
                    point.copy_(project(point))
        return Posterior(self.model, guide, record)


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
