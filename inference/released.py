"""The training that the released BLoB code runs, kept apart from the ELBO that `SVI` maximises."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrolora.guides.base import Guide, GuideSpecification, by_pattern
from pyrolora.guides.blob import BLoB, SquaredScaleFactor
from pyrolora.guides.local import local_weight
from pyrolora.inference.engine import StepStats
from pyrolora.inference.laplace.precision import declared_prior
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split

# added to standard deviations and variances in the released KL
EPSILON = 1e-6
# the released exponent is pi / gamma with this pi
PI = 3.14159
# below it a cycle is longer than any fit
LEAST_GAMMA = 1.0


@dataclass(frozen=True)
class ReleasedBLoB(SVI):
    """BLoB as its authors' code trains it: two optimisers, noise for every token, a KL weight that doubles step by step.

    Usage::

        prior = {"*.lora_A": Normal(0, 0.2), "*.lora_B": Flat()}
        model = BayesianModel(backbone, task, adapter=[LoRA(), LabelLoRA()], prior=prior)
        posterior = ReleasedBLoB(steps=5000).fit(model, task.train)
        posterior.predict(task.test, kind="flipout", draws=10)          # as released

    Each step is Adam on M and B along the mean NLL under Flipout, then SGD on G along ``NLL + pi KL`` and on M along
    ``pi KL``. The weights ``pi_i = 2^i / (2^(M+1) - 1)`` of a cycle of M steps sum to one and M is not the number of steps in
    an epoch, so this is the schedule of no ELBO; final widths are decided by the SGD rate times the number of cycles. Data
    are read in a fixed order, each epoch dropping what does not fill a batch. Both rates start at zero in the first step.
    The released code adapts the vocabulary head as well: that is `LabelLoRA`.

    Source: Wang et al., "BLoB", 2024, and its released code.

    Args:
        guide: ``BLoB(variant="release")``.
        steps: optimisation steps; the released code goes on to the end of the epoch at a rate of zero.
        batch_size: examples a step.
        learning_rate: Adam's rate.
        scale_learning_rate: the rate of SGD.
        gamma: M is ``100 N^(pi / gamma) / batch_size``, rounded down.
        noise: ``"flipout"``.

    Raises:
        ValueError: a setting that the released algorithm does not have.
    """

    guide: GuideSpecification = field(
        default_factory=lambda: BLoB(variant="release"), metadata={"help": 'BLoB(variant="release")'}
    )
    steps: int = field(default=5000, metadata={"help": "optimisation steps"})
    batch_size: int = field(default=4, metadata={"help": "examples a step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "Adam's rate"})
    scale_learning_rate: float = field(default=0.01, metadata={"help": "rate of SGD"})
    gamma: float = field(default=8.0, metadata={"help": "sets the cycle of the KL's weight"})
    noise: str = field(default="flipout", metadata={"help": "'flipout'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = {"kl_weight": 1.0, "particles": 1, "noise": "flipout", "max_grad_norm": None, "average": 0.0}
        for name, value in {**fixed, "schedule": None, "width": "gradient", "retaining": None}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"The released algorithm has no {name} but {value!r}; got {getattr(self, name)!r}. Use SVI(guide=BLoB())."
                )
        if not self.gamma >= LEAST_GAMMA:
            raise ValueError(
                f"gamma must be at least {LEAST_GAMMA:g}, since a cycle has 100 N^(pi / gamma) / batch_size steps; got "
                f"{self.gamma}. The released value is 8."
            )
        if any(
            not isinstance(family, BLoB) or family.variant != "release" for family in by_pattern(self.guide).values()
        ):
            raise ValueError(f'ReleasedBLoB fits BLoB(variant="release"); got {self.guide}. Use SVI for other guides.')

    def check_guide(self, model: BayesianModel, guide: Guide, num_data: int) -> None:
        """See `SVI.check_guide`: the released algorithm knows few priors and drops what fills no batch."""
        if num_data < self.batch_size:
            raise ValueError(
                f"{num_data} examples do not fill one batch of {self.batch_size}, and the released code drops the rest. Give "
                "a smaller batch_size."
            )
        _prior_variances(model, _normals(guide))

    def iterate(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> TrainingRun:
        """See `SVI.iterate`."""
        return ReleasedRun(self, model, data, generator=generator, start=start)

    def cycle(self, num_data: int) -> int:
        """Steps M in which the weights of the KL sum to one."""
        kept = num_data // self.batch_size * self.batch_size
        return max(1, int(100 * kept ** (PI / self.gamma) / self.batch_size))

    def kl_weight_at(self, step: int, num_data: int) -> float:
        """Weight of the KL in a step, counted from 0."""
        cycle = self.cycle(num_data)
        # 2^i / (2^(M + 1) - 1) without numbers that overflow
        return 2.0 ** (step % cycle - cycle) / (1 - 2.0 ** -(cycle + 1))


class ReleasedRun(TrainingRun):
    """The state of one fit of `ReleasedBLoB`."""

    engine: ReleasedBLoB

    def __init__(
        self,
        engine: ReleasedBLoB,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(engine, model, data, generator=generator, start=start)
        self.normals = _normals(self.guide)
        self.variances = _prior_variances(model, self.normals)
        for group in self.optimiser.adam.param_groups:
            group["eps"] = EPSILON

    def _stream(self, start: int) -> Iterator[dict[str, Tensor]]:
        size = self.engine.batch_size
        while True:
            first = start % (len(self.data) // size) * size
            yield self.data.batch(list(range(first, first + size)))
            start += 1

    def _rate_factor(self, step: int) -> float:
        """Linear from zero over the warm-up, then linear to zero."""
        rising = self.engine.warmup * self.engine.steps
        if step < rising:
            return step / max(1.0, rising)
        return max(0.0, (self.engine.steps - step) / max(1.0, self.engine.steps - rising))

    def take_step(self, batch: Mapping[str, Tensor]) -> StepStats:
        """One step of both optimisers, which becomes part of the history.

        Raises:
            FloatingPointError: loss or gradient is not finite.
        """
        engine, factor = self.engine, self._rate_factor(self.step)
        self.optimiser.zero_grad()
        draw: dict[str, Any] = {
            name: local_weight(f.distribution(), "flipout") if name in self.normals else f.mean()
            for name, f in self.guide.items()
        }
        with self._seeded_step():
            logits = self.model.row_logits(batch, draw)
            loss = functional.cross_entropy(logits, batch["labels"].to(logits.device))
            loss.backward()
        loss = loss.detach()
        norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if not (math.isfinite(float(loss)) and math.isfinite(norm)):
            raise FloatingPointError(self._describe_failure(float(loss), norm))
        self.consistent = False
        # Adam has never heard of G: the released code makes its optimiser before G exists
        kept = {name: f.root_scale.grad for name, f in self.normals.items()}
        for f in self.normals.values():
            f.root_scale.grad = None
        self.optimiser.gradients()
        self.optimiser.step(factor)
        weight, rate = engine.kl_weight_at(self.step, len(self.data)), factor * engine.scale_learning_rate
        divergence = self._descend_kl(kept, weight, rate)
        self.step += 1
        stats = StepStats(self.step, float(loss) + weight * divergence, float(loss), divergence, norm)
        self.history.append(stats)
        self.consistent = True
        return stats

    @torch.no_grad()
    def _descend_kl(self, likelihood: Mapping[str, Tensor | None], weight: float, rate: float) -> float:
        """SGD on means and widths; the KL before it, nats.

        Its gradients are written out, in float64: ``2 M / (2 s^2 + e)`` and ``2 G (2 G^2 / (2 s^2 + e) - 1 / (G^2 + e))``.
        """
        total = 0.0
        for name, f in self.normals.items():
            mean, root = f.loc.double(), f.root_scale.double()
            spread = 2 * self.variances[name] + EPSILON
            sigma = root.square()
            prior = math.sqrt(self.variances[name])
            terms = (
                math.log(prior + EPSILON) - (sigma + EPSILON).log() + (sigma.square() + mean.square()) / spread - 0.5
            )
            total += float(terms.sum())
            f.loc.sub_((rate * weight * 2 * mean / spread).to(f.loc))
            slope = weight * 2 * root * (2 * sigma / spread - 1 / (sigma + EPSILON))
            own = likelihood[name]
            f.root_scale.sub_((rate * (slope if own is None else slope + own)).to(f.root_scale))
        return total


def _normals(guide: Guide) -> dict[str, SquaredScaleFactor]:
    """Site name -> factor, of the sites with a width."""
    return {name: factor for name, factor in guide.items() if isinstance(factor, SquaredScaleFactor)}


def _prior_variances(model: BayesianModel, normals: Mapping[str, SquaredScaleFactor]) -> dict[str, float]:
    found = {}
    for name in model.adapter_sites:
        if name not in normals and not isinstance(model.prior.declared[name], Flat):
            raise ValueError(
                f"The released algorithm has no prior on {name!r}, and one is declared. Declare Flat() there: "
                'prior={"*.lora_A": Normal(0, 0.2), "*.lora_B": Flat()}.'
            )
    for name, prior in declared_prior(model, tuple(normals)).items():
        if prior.precision.numel() > 1 or prior.mean.any() or name in model.prior.scales:
            raise ValueError(f"The released KL knows one fixed Normal(0, scale) a site; that of {name!r} is another.")
        found[name] = float(prior.precision.double().reciprocal())
    return found
