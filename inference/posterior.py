"""The posterior that every engine returns."""

from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.guides.base import Guide, SeededBy
from pyrolora.guides.samplers import require_sampler
from pyrolora.inference.last_layer import LastLayerHead, only_random_in_the_head
from pyrolora.inference.linearised import Linearised, normal_sites
from pyrolora.inference.links import BINARY_LINKS, LINKS, SHIFT_INVARIANT, softmax_draws
from pyrolora.inference.noise import TOKEN_SCOPES
from pyrolora.inference.predictive import (
    DRAWS_A_ROUND,
    Batch,
    Predictive,
    RowPrediction,
    gather_rows,
    join_draws,
    logits_of_draws,
    monte_carlo_error,
)
from pyrolora.inference.token_noise import TokenNoise, token_methods
from pyrolora.models.adapters.base import PROGRESS
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split, row_count
from pyrolora.models.trunk import BUDGET, TrunkCache

LINEARISED = ("linearised", *LINKS, *BINARY_LINKS)
# every kind of prediction that some posterior has
KINDS = ("mc", "mean", *LINEARISED, *TOKEN_SCOPES)


class Posterior:
    """A fitted guide over the sites of a model, whatever engine fitted it.

    Usage::

        posterior = SVI(guide=BLoB()).fit(model, task.train)
        posterior.predict(task.test, draws=10).mean_probs
        posterior.save_pretrained("runs/blob")

    Args:
        model: the model whose sites it describes. Where its prior has learned scales, the posterior keeps them as they
            are now (`BayesianModel.settled`).
        guide: the fitted guide.
        record: what made it (engine, settings, seed, history), kept with saved files.
    """

    def __init__(self, model: BayesianModel, guide: Guide, record: Mapping[str, Any]) -> None:
        self.model = model.settled()
        self.guide = guide
        self.record = dict(record)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of prediction: ``"mc"``, ``"mean"``; linearised and token noise where every random site allows them."""
        linearised = ("linearised", *self._links()) if normal_sites(self.guide, self.model) else ()
        return ("mc", "mean", *linearised, *token_methods(self.guide, self.model))

    def _links(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {**LINKS, **(BINARY_LINKS if self.model.classes == 2 else {})}

    @property
    def default_kind(self) -> str:
        """The kind of prediction used when none is named: ``"mean"`` for a point estimate, else ``"mc"``."""
        return "mean" if self.is_point else "mc"

    @property
    def is_point(self) -> bool:
        """Whether all mass lies on one value, so that every draw is the same."""
        return not any("scale" in factor.roles.values() for _, factor in self.guide.items())

    @property
    def logit_temperature(self) -> float:
        """What the logits of every draw are divided by in prediction; 1 unless `temperature_scaled` set it."""
        return float(self.record.get("logit_temperature", 1.0))

    @property
    def progress(self) -> float:
        """Share of its training that was done, from 0 to 1."""
        done, steps = self.record.get("steps_done"), self.record.get("steps")
        return done / steps if done is not None and steps else 1.0

    @property
    def context(self) -> dict[str, Tensor]:
        """What gates that fade must know of an unfinished fit, as entries of a batch; nothing for a finished one."""
        fading = self.progress < 1 and PROGRESS in self.model.context_keys
        return {PROGRESS: torch.tensor(self.progress)} if fading else {}

    def sample(
        self, draws: int, *, generator: torch.Generator | None = None, sampler: str = "independent"
    ) -> dict[str, Tensor]:
        """Coherent draws of all sites; the same generator state gives the same draws.

        Args:
            draws: how many.
            generator: seeds them.
            sampler: ``"independent"``, ``"antithetic"`` (mirrored pairs) or ``"stratified"`` (a Latin hypercube), see
                `pyrolora.guides.samplers.draws_of`.

        Shape:
            site name -> ``(draws, *site.shape)``
        """
        return self.guide.sample(draws, generator, sampler)

    def log_prob(self, draw: Mapping[str, Tensor]) -> Tensor:
        """Log posterior density of draws in nats, ``(draws,)``; a site that is a point adds 0 there, else minus infinity."""
        return self.guide.log_prob(draw)

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean, site name -> tensor of the site's shape."""
        return self.guide.mean()

    @torch.no_grad()
    def predict(
        self,
        data: Batch | Split | EncodedSplit,
        *,
        draws: int = 10,
        kind: str | None = None,
        generator: torch.Generator | None = None,
        sampler: str = "independent",
        tolerance: float | None = None,
        batch_size: int = 32,
        progress: bool = False,
    ) -> Predictive:
        """Posterior predictive probabilities of a batch or a whole split, rows in the order given.

        Args:
            data: a batch, or a split (length-bucketed internally).
            draws: number of weight draws; every row sees the same draws, so rows are jointly coherent. With ``tolerance``
                the most that are taken.
            kind: ``"mc"``, weight draws through the network; ``"mean"``, the posterior mean; ``"linearised"``, quasi-random
                draws of the logits of the network linearised at the mean (`LOGIT_DRAWS` of them whatever ``draws``);
                ``"linearised_mf1"``, ``"linearised_probit"`` and ``"linearised_bridge"``, the same in closed form;
                ``"token"`` and ``"flipout"``, noise for every token as released BLoB code has it, which is not the posterior
                predictive. The default is the posterior's own.
            generator: seeds the draws.
            sampler: how the draws of ``kind="mc"`` are spread, see `sample`.
            tolerance: stop drawing when the Monte-Carlo standard error of the mean probabilities, averaged over rows and
                classes, falls below this; None takes all draws. For ``kind="mc"``.
            batch_size: rows at once, before draws are put on the batch axis.
            progress: show a bar.

        Raises:
            ValueError: an unknown kind or sampler (the nearest is offered), a linearised kind beside gates that are drawn for
                single rows, draws that are no whole number of one or more, a tolerance that is not positive, or a tolerance
                or sampler where no weights are drawn.
        """
        kind = self.default_kind if kind is None else kind
        if kind not in (kinds := self.kinds):
            remedy = f"Did you mean {nearest(kind, kinds)!r}?"
            if kind in LINEARISED and self.model.draws_locally:
                remedy = "An adapter draws its gate for each row anew, which no linearisation holds. Use kind='mc'."
            raise ValueError(
                f"{type(self).__name__} has no prediction of kind {kind!r}. {remedy} Kinds: {', '.join(kinds)}."
            )
        if not isinstance(draws, Integral) or draws < 1:
            raise ValueError(
                f"A prediction needs at least one draw, a whole number; got {draws}. A usual choice is 10."
            )
        require_sampler(sampler)
        if sampler != "independent" and kind != "mc":
            raise ValueError(f"sampler={sampler!r} spreads weight draws, and kind={kind!r} takes none. Use kind='mc'.")
        if tolerance is not None and (kind != "mc" or not tolerance > 0):
            raise ValueError(
                f"A tolerance must be positive and needs kind='mc'; got {tolerance} with kind={kind!r}. Try 0.005."
            )
        if isinstance(data, Mapping):
            rows = row_count(data)
            batches: list[Batch] = [{**data, "index": torch.arange(rows)}]
            labels = data.get("labels")
        else:
            encoded = self.model.encode(data)
            rows, batches, labels = len(encoded), list(encoded.batches(batch_size)), encoded.labels
        # a batch is met once, unless more draws may follow
        budget = 0 if tolerance is None else BUDGET
        trunks = TrunkCache(self.model.backbone, self.model.first_block, rows, budget)
        found: list[Predictive] = []
        taken, wanted = 0, draws if tolerance is None else DRAWS_A_ROUND
        while taken < draws:
            parts: list[tuple[Tensor, RowPrediction]] = []
            predict_batch = self._predictor(kind, min(wanted, draws - taken), generator, sampler)
            # what adapters draw for single rows comes from torch's global state
            local = None
            if self.model.draws_locally and generator is not None:
                local = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
            for batch in tqdm(batches, desc="predict", disable=not progress, leave=False):
                whole = {**trunks.attach(batch), **self.context}
                with SeededBy(local, self.guide.devices()):
                    made = predict_batch(whole)
                made = made if isinstance(made, RowPrediction) else RowPrediction(made)
                parts.append((batch["index"], made.tempered(self.logit_temperature)))
            found.append(gather_rows(parts, None if labels is None else labels.cpu(), kind))
            taken += wanted
            if tolerance is None or monte_carlo_error(found, sampler) < tolerance:
                break
        self.model.release()
        return join_draws(found)

    def _predictor(self, kind: str, draws: int, generator: torch.Generator | None, sampler: str) -> Any:
        """A function from a batch to a `RowPrediction`, or to its probabilities alone, with its draws taken once."""
        if kind == "mean":
            mean = self.mean()
            return lambda batch: RowPrediction.from_logits(self.model.logits(batch, mean))
        linear = only_random_in_the_head(self.model, self.guide)
        if kind in self._links():
            linearised, link = self._gaussian_logits(linear), self._links()[kind]
            return lambda batch: link(*linearised(batch, contrasts=link in SHIFT_INVARIANT))[None]
        if kind == "linearised":
            linearised = self._gaussian_logits(linear)
            # one set of quasi-random points for all rows, as one set of weight draws would be
            seed = int(torch.randint(2**31, (), generator=generator))
            return lambda batch: softmax_draws(*linearised(batch, contrasts=True), torch.Generator().manual_seed(seed))
        if kind in TOKEN_SCOPES:
            return TokenNoise(self.model, self.guide, kind, draws, generator)
        sampled = self.sample(draws, generator=generator, sampler=sampler)
        if linear:
            head, mean = LastLayerHead(self.model), self.mean()

            def from_features(batch: Batch) -> RowPrediction:
                return RowPrediction.from_logits(head.logits(self.model.features(batch, mean), sampled[HEAD]))

            return from_features
        return lambda batch: RowPrediction.from_logits(logits_of_draws(self.model, batch, sampled, draws))

    def _gaussian_logits(self, linear: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        """Mean and covariance of a batch's logits: of the linearised network, or exact where it is linear anyway."""
        if not linear:
            return Linearised(self.model, self.guide)
        head, mean = LastLayerHead(self.model), self.mean()
        q = head.factor(self.guide).distribution()

        def moments(batch: Batch, contrasts: bool = False) -> tuple[Tensor, Tensor]:
            found = head.moments(q, self.model.features(batch, mean))
            return found.mean, found.covariance

        return moments

    def to_arviz(self, *args: Any, **kwargs: Any) -> Any:
        """An `xarray.DataTree` of draws, predictions and training curves; see `pyrolora.inference.arviz.to_datatree`."""
        from pyrolora.inference.arviz import to_datatree

        return to_datatree(self, *args, **kwargs)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the posterior to a folder; see `pyrolora.inference.storage.save`."""
        from pyrolora.inference.storage import save

        return save(self, folder)

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        backbone: Any = None,
        *,
        model: BayesianModel | None = None,
        data_dir: str | Path | None = None,
    ) -> "Posterior":
        """Read a posterior from a folder; see `pyrolora.inference.storage.load`."""
        from pyrolora.inference.storage import load

        return load(folder, backbone, model=model, data_dir=data_dir)
