"""Adversarial meta-tuning: few-shot episodes, queries attacked in pixels, and weights perturbed before each step."""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.guides.base import GuideSpecification
from pyrolora.guides.point import Point
from pyrolora.inference.optimiser import GuideAdam
from pyrolora.inference.perturbations import (
    DIRECTIONS,
    PGD,
    PerturbedSites,
    WeightPerturbation,
    divergence,
    divergence_objective,
)
from pyrolora.inference.perturbations.target import AttackTarget
from pyrolora.inference.riemannian import RiemannianStep
from pyrolora.inference.schedules import BlockPlan
from pyrolora.inference.svi import SVI
from pyrolora.inference.training import TrainingRun
from pyrolora.models.likelihoods import observe_labels
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split

# a posterior is attacked through the mean of so many draws
ATTACK_DRAWS = 3


@dataclass(frozen=True)
class MetaTuning(SVI):
    """Fits a guide to episodes by ``E_q[CE + weight * KL(clean || attacked)] + KL(q || prior) / N``.

    Usage::

        source = episodic(task("omniglot_background", data_dir="omniglot"), ways=5, shots=1)
        model = BayesianModel(backbone, source, adapter=PiSSA(rank=8, targets="all-linear"), prior=Relative(0.1))
        member = MetaTuning(attack=PGD(0.03), adversarial_weight=1.0, steps=300).fit(model, source.train)

    One fit makes one member of a pool; fit one for each ``epsilon`` and put them together with `pool_of`. A step attacks the
    queries with the support features held fixed, ascends on the divergence from the clean prediction (labels play no part in
    it), perturbs the weights, and descends on the gradient taken there. The attack is made outside the Pyro program, from
    the posterior's mean or, if the guide is random, against the mean of a few draws; the divergence enters the program as
    a factor inside the data plate, which makes the posterior a Gibbs posterior. Episodes are without end, so the size N of
    the data is the declared one: queries in the split's episodes.

    With ``attack=None``, ``adversarial_weight=0`` and no perturbation it is plain meta-tuning. The optimiser is the published
    one: SGD with momentum, a linear rise and a cosine to zero.

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, equations 3 to 5 and algorithm 1, and its released code.

    Args:
        guide: see `SVI`.
        steps: steps of ``batch_size`` queries, at least one episode.
        batch_size: queries a step, in whole episodes; 1 for one episode.
        learning_rate: peak rate for means and points. The published 5e-4 is for 60,000 episodes.
        scale_learning_rate: peak rate for standard deviations; with Adam try 2e-2.
        noise: see `SVI`; ``"weight"`` draws once a step, ``"example"`` once an episode.
        attack: how queries are attacked, `PGD` or `PyramidPGD`; None for clean meta-tuning.
        adversarial_weight: weight of the divergence; the published 6 collapses the features of a tiny network.
        direction: see `divergence`.
        perturbation: see `WeightPerturbation`.
        momentum: of SGD; None for Adam, whose rate for standard deviations is one that they converge under.

    Raises:
        ValueError: a setting out of range, or one that belongs to another optimiser.
        TypeError: an attack or a perturbation that is none.
    """

    guide: GuideSpecification = field(default_factory=Point, metadata={"help": "family of the posterior"})
    batch_size: int = field(default=1, metadata={"help": "queries a step, in whole episodes"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak rate of means and points"})
    scale_learning_rate: float = field(default=5e-4, metadata={"help": "peak rate of standard deviations"})
    noise: str = field(default="weight", metadata={"help": "'weight' or 'example'"})
    warmup: float = field(default=1 / 6, metadata={"help": "fraction of the steps with rising rates"})
    attack: PGD | None = field(default=None, metadata={"help": "how queries are attacked; None for not at all"})
    adversarial_weight: float = field(default=6.0, metadata={"help": "weight of the divergence"})
    direction: str = field(default="code", metadata={"help": "'code', KL(clean || attacked), or 'paper'"})
    perturbation: WeightPerturbation = field(
        default_factory=lambda: WeightPerturbation("awp", 1e-3), metadata={"help": "how weights are perturbed"}
    )
    momentum: float | None = field(default=0.9, metadata={"help": "of SGD; None for Adam"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack is not None and not isinstance(self.attack, PGD):
            raise TypeError(f"The attack is a {type(self.attack).__name__}; expected PGD(epsilon), PyramidPGD or None.")
        if not isinstance(self.perturbation, WeightPerturbation):
            raise TypeError(
                f"The perturbation is a {type(self.perturbation).__name__}; expected WeightPerturbation('awp', 1e-3)."
            )
        if not self.adversarial_weight >= 0:
            raise ValueError(f"adversarial_weight must not be negative; got {self.adversarial_weight}. Try 1.0.")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum lies in [0, 1), or None for Adam; got {self.momentum}. The published one is 0.9."
            )
        if self.direction not in DIRECTIONS:
            raise ValueError(
                f"Unknown direction {self.direction!r} of the divergence. Did you mean "
                f"{nearest(self.direction, DIRECTIONS)!r}? Directions: {', '.join(DIRECTIONS)}."
            )
        if self.retaining is not None:
            raise ValueError(
                "The classes of an episode are numbered anew in each, so there is nothing of theirs to retain. Leave "
                "retaining out, or use MAP or SVI on a task of classes."
            )
        for name, value in {"schedule": None, "particles": 1}.items():
            if getattr(self, name) != value:
                raise ValueError(f"Meta-tuning has no {name} but {value}; got {getattr(self, name)!r}. Leave it out.")
        if self.noise not in ("weight", "example"):
            raise ValueError(
                f"noise={self.noise!r} draws no weights that could be perturbed. Use noise='weight' or noise='example'."
            )

    @property
    def attacks(self) -> bool:
        """Whether queries are attacked at all."""
        return self.attack is not None and self.attack.epsilon > 0 and self.adversarial_weight > 0

    def iterate(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        generator: torch.Generator | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> TrainingRun:
        """See `SVI.iterate`."""
        self._check_backbone(model)
        return MetaTuningRun(self, model, data, generator=generator, start=start)

    def check(self, model: BayesianModel, num_data: int, *, estimated: bool = False) -> None:
        """See `SVI.check`."""
        self._check_backbone(model)
        super().check(model, num_data, estimated=estimated)

    def _check_backbone(self, model: BayesianModel) -> None:
        if self.attack is not None and "image" not in model.backbone.formats:
            raise ValueError(
                f"The attack {self.attack} moves pixels, and {model.backbone.name!r} reads none. Leave attack out, or use a "
                "vision backbone."
            )

    def to_dict(self) -> dict[str, Any]:
        """See `SVI.to_dict`."""
        attack = self.attack and {"attack": type(self.attack).__name__, **asdict(self.attack)}
        return {**super().to_dict(), "attack": attack, "perturbation": asdict(self.perturbation)}


class MetaTuningRun(TrainingRun):
    """The state of one fit of `MetaTuning`."""

    engine: MetaTuning

    def _make_optimiser(
        self, plan: BlockPlan | None, manifold_step: RiemannianStep, left_out: Collection[str]
    ) -> GuideAdam:
        if self.engine.momentum is None:
            return super()._make_optimiser(plan, manifold_step, left_out)
        descend = partial(torch.optim.SGD, momentum=self.engine.momentum)
        return GuideAdam(self.guide, self._rates(), plan, manifold_step, left_out, descend)

    def _rate_factor(self, step: int) -> float:
        """Linear rise over the warm-up, then a cosine that would reach zero after the last step."""
        rising = max(1, round(self.engine.warmup * self.engine.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.engine.steps - rising)))

    def _backward(self, batch: Mapping[str, Tensor]) -> float:
        """See `TrainingRun._backward`: the attack, the perturbation, and the gradient at the perturbed weights."""
        given, perturbation = batch, self.engine.perturbation
        if self.engine.attacks:
            with self._same_draws():
                given = self._attacked(batch)
        deltas: dict[str, Tensor] = {}
        if perturbation.active:
            with self._same_draws():
                deltas = self._deltas(given)
        if perturbation.mode != "paper" or not deltas:
            return self._elbo(given, deltas)
        # each factor's gradient while only that factor is perturbed
        kept: dict[int, Tensor | None] = {}
        losses = []
        for factor in dict.fromkeys(_factor(name) for name in deltas):
            self.optimiser.zero_grad()
            with self._same_draws():
                losses.append(self._elbo(given, {name: d for name, d in deltas.items() if _factor(name) == factor}))
            for name, posterior in self.guide.items():
                if _factor(name) == factor or name not in deltas:
                    kept.update({id(parameter): parameter.grad for parameter in posterior.parameters()})
        for parameter in self.parameters:
            parameter.grad = kept[id(parameter)]
        return sum(losses) / len(losses)

    def _elbo(self, batch: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> float:
        program: Callable[..., Any] = partial(
            robust_program, self.model, weight=self.engine.adversarial_weight, direction=self.engine.direction
        )
        if deltas:
            program = PerturbedSites(deltas)(program)
        run_model, run_guide = self._scoped(program, batch), self._scoped(self.guide.__call__, batch)
        return self.elbo.loss_and_grads(run_model, run_guide, batch, len(self.data))

    def _same_draws(self) -> AbstractContextManager[None]:
        """What is drawn inside is drawn again by whatever comes after."""
        device = self.model.backbone.device
        return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    @torch.no_grad()
    def _attacked(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its queries attacked beside them."""
        assert self.engine.attack is not None
        draws = ATTACK_DRAWS if self.noisy_sites else 1
        draw = self.guide.sample(draws) if self.noisy_sites else self.guide.mean()
        target = AttackTarget(self.model, batch, draw, draws)
        images = batch["pixel_values"].to(self.model.backbone.device)
        objective = divergence_objective(target, images, self.engine.direction)
        # the seed of the step decides the start, whatever the posterior drew before
        source = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        return {**batch, "attacked": self.engine.attack(images, objective, source)}

    def _deltas(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The perturbation of every stack of matrices at the draw that the step will see."""
        perturbation, table = self.engine.perturbation, self.model.adapter_sites
        with torch.no_grad():
            drawn = self._scoped(self.guide.__call__, batch)(batch)
        matrices = [name for name, site in table.items() if len(site.shape) == 3]
        values = {name: drawn[name].detach().requires_grad_() for name in matrices}
        gradients: dict[str, Tensor] = {}
        if perturbation.needs_gradient:
            clean, attacked = robust_logits(self.model, batch, {**drawn, **values})
            labels = batch["labels"].to(clean.device)
            if attacked is None:
                objective = functional.cross_entropy(clean, labels)
            elif perturbation.mode == "paper":
                objective = functional.cross_entropy(attacked, labels)
            else:
                penalty = self.engine.adversarial_weight * divergence(clean, attacked, self.engine.direction).mean()
                objective = functional.cross_entropy(clean, labels) + penalty
            found = torch.autograd.grad(objective, list(values.values()), allow_unused=True)
            # a router that has faded is no weight of the objective: it has no worst case to move to
            gradients = {name: slope for name, slope in zip(values, found, strict=True) if slope is not None}
        centres = self.model.centres()
        factors = {name: value.detach() + centres.get(name, 0.0) for name, value in values.items()}
        source = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        return perturbation.deltas(factors, gradients, source)


def _factor(site: str) -> str:
    return site.rsplit(".", 1)[-1]


def robust_program(
    model: BayesianModel, batch: Mapping[str, Tensor], num_data: int, *, weight: float, direction: str = "code"
) -> Tensor:
    """The model's program with the divergence of attacked rows as a factor: ``robust_program(model, batch, N, weight=1.0)``.

    Args:
        model: the model.
        batch: its labelled batch; with ``attacked``, images in the place of ``pixel_values``, the factor is there.
        num_data: rows of the whole data set.
        weight: of the divergence, nats per nat.
        direction: see `divergence`.

    Returns:
        The labels.
    """
    clean, attacked = robust_logits(model, batch, model.sample_sites(), local=True)
    penalty = None if attacked is None else weight * divergence(clean, attacked, direction)
    return observe_labels(clean, batch["labels"].to(clean.device), batch["index"].to(clean.device), num_data, penalty)


def robust_logits(
    model: BayesianModel, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor], *, local: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits of the clean rows and of the attacked ones under one draw; None without an attack.

    Args:
        model: the model.
        batch: see `robust_program`.
        draw: site name -> value.
        local: see `BayesianModel.row_logits`.

    Shape:
        ``(rows, classes)`` twice
    """
    if "attacked" not in batch:
        return model.row_logits(batch, draw, local=local), None
    clean = batch["pixel_values"].to(batch["attacked"].device)
    # side by side, so that rows that share a draw or a gate stay together
    both = torch.stack([clean, batch["attacked"]], dim=1).flatten(0, 1)
    logits = model.row_logits({**batch, "pixel_values": both}, draw, local=local).unflatten(0, (-1, 2))
    return logits[:, 0], logits[:, 1]
