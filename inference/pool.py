"""Members fitted one at a time put together to a pool, and a pool merged anew for every task."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyrolora.guides.base import Factor
from pyrolora.guides.build import build_guide, resolve
from pyrolora.inference.digests import tensor_digest
from pyrolora.inference.perturbations import PGD, cross_entropy_objective
from pyrolora.inference.perturbations.target import AttackTarget
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters.pissa import PiSSA
from pyrolora.models.adapters.pool import LoRAPool
from pyrolora.models.merging import MergeRule
from pyrolora.models.mixture_prior import MemberMixture
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.prototypes import class_prototypes, cosine_similarity
from pyrolora.models.settings import check_numbers
from pyrolora.models.tasks.augmentation import Augmentation
from pyrolora.models.trimming import Trim, trimmed_deltas

# below any uniform number that is drawn, and its logarithm finite
TINY = 1e-300
SEMANTICS = ("mean", "mixture", "dirichlet")


def pool_of(posteriors: Sequence[Posterior]) -> Posterior:
    """The posteriors of members side by side, as one posterior over a `LoRAPool`: ``pool_of([clean, robust])``.

    Members that were fitted one at a time are independent under the posterior, so nothing is lost by it.

    Args:
        posteriors: of models with one `PiSSA` adapter each, on one backbone and from one start, under one prior and asked
            alike: a pool has one of each. Tasks may be of other images.

    Raises:
        ValueError: no posterior, other adapters, backbones, starts, priors, formats or families, or a family that ties
            weights together.
    """
    if not posteriors:
        raise ValueError("A pool needs at least one member; the list of posteriors is empty.")
    first = posteriors[0].model
    for posterior in posteriors:
        _check_member(posterior.model, first)
    member = first.adapters[0]
    assert isinstance(member, PiSSA)
    adapter = LoRAPool(**asdict(member), members=len(posteriors))
    weights = {adapter.weights_name: torch.full((len(posteriors),), 1 / len(posteriors))}
    model = BayesianModel(
        first.backbone, first.task, adapter, first.prior.specification, num_data=first.num_data,
        max_length=first.max_length, constants={**first.constants, **weights},
    )  # fmt: skip
    families = {name: factor.family for name, factor in posteriors[0].guide.items()}
    guide = build_guide(resolve(families, model.sites), model)
    for name, factor in guide.items():
        parts = [dict(posterior.guide.items())[name] for posterior in posteriors]
        _fill(name, factor, parts, first.adapter_sites[name].shape)
    record = {"engine": "pool_of", "members": [posterior.record for posterior in posteriors]}
    return Posterior(model, guide, record)


def _check_member(model: BayesianModel, first: BayesianModel) -> None:
    kinds = ", ".join(type(adapter).__name__ for adapter in model.adapters)
    if len(model.adapters) != 1 or type(model.adapters[0]) is not PiSSA:
        raise ValueError(f"A member of a pool has one PiSSA adapter; this posterior's model has {kinds}.")
    if learned := model.prior.learned_sites:
        raise ValueError(
            f"The prior scale of {learned[0]!r} was learned for this member alone, and a pool has one prior. Fit the members "
            "under a fixed prior, such as Relative(0.1)."
        )
    if model.adapters != first.adapters:
        raise ValueError(
            f"Members differ in their adapters: {first.adapters[0]} and {model.adapters[0]}. Fit them alike."
        )
    if model.backbone.fingerprint != first.backbone.fingerprint:
        raise ValueError(f"Members are on different backbones, {first.backbone.name!r} and {model.backbone.name!r}.")
    if tensor_digest(model.constants) != tensor_digest(first.constants):
        raise ValueError(
            "Members start from different factors (A0, B0), so they share no residual. Build their models with the constants "
            "of the first: BayesianModel(..., constants=first.constants)."
        )
    if model.task.format != first.task.format:
        raise ValueError(
            f"Members are of tasks that ask differently, {first.task.format} and {model.task.format}. Fit them on episodes "
            "with the same ways, shots and queries."
        )
    mine, its = first.prior.to_dict(), model.prior.to_dict()
    if other := [name for name in mine if its[name] != mine[name]]:
        raise ValueError(
            f"Members differ in the prior of {other[0]!r}: {first.prior.declared[other[0]]} and "
            f"{model.prior.declared[other[0]]}. Fit them alike."
        )


@torch.no_grad()
def _fill(name: str, factor: Factor, parts: Sequence[Factor], shape: torch.Size) -> None:
    """Put members' parameters side by side along the rank."""
    along = -2 if name.endswith("lora_A") else -1
    for part in parts:
        if part.family != parts[0].family:
            raise ValueError(
                f"Members differ in the guide of {name!r}: {parts[0].family} and {part.family}. Fit them alike."
            )
    for key, parameter in factor.named_parameters():
        values: list[Tensor] = [part.get_parameter(key) for part in parts]
        if any(value.shape != shape for value in values):
            raise ValueError(
                f"{type(parts[0].family).__name__} ties the weights of {name!r} together, so members cannot stand side "
                "by side. "
                "Use MeanField, BLoB or Point."
            )
        parameter.copy_(torch.cat(values, dim=along))


def member_slice(adapter: LoRAPool, values: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
    """The factors of one member out of a draw of the pool: ``member_slice(pool, posterior.mean(), 0)``.

    Args:
        adapter: the pool.
        values: site name -> value, maybe with a leading dimension of draws.
        member: its number.
    """
    along = slice(member * adapter.rank, (member + 1) * adapter.rank)
    return {
        name: value[..., along, :] if name.endswith("lora_A") else value[..., along]
        for name, value in values.items()
        if name.endswith(("lora_A", "lora_B"))
    }


def mixture_prior(posterior: Posterior, weights: Tensor) -> MemberMixture:
    """A pool as the prior of one adapter: a mixture of its members' posteriors.

    Usage::

        prior = mixture_prior(pool, merging.weights(batch)[0])
        model = BayesianModel(backbone, task, adapter=pool.model.adapters[0].member, prior=prior)
        tuned = MAP().fit(model, data, start=member_slice(adapter, pool.mean(), int(weights.argmax())))

    A member without a width (a point) is as wide as its prior.

    Args:
        posterior: of a pool.
        weights: probability of each member, such as a task's merge weights.

    Shape:
        weights ``(members,)``

    Raises:
        ValueError: no pool, another number of weights, or members without any width.
    """
    adapter, model = pool_adapter(posterior.model), posterior.model
    if weights.shape != (adapter.members,):
        raise ValueError(f"The pool has {adapter.members} members; got weights of shape {tuple(weights.shape)}.")
    scales = {}
    for name, factor in posterior.guide.items():
        if not name.endswith(("lora_A", "lora_B")):
            continue
        random = "scale" in factor.roles.values()
        q = factor.distribution() if random else model.prior(model.adapter_sites[name])
        try:
            scales[name] = q.stddev.detach()
        except (NotImplementedError, AttributeError) as error:
            raise ValueError(
                f"The members are points at {name!r} and their prior there has no width, so neither has their mixture. Fit "
                "them under a Normal or Relative prior, or with MeanField()."
            ) from error

    def stacked(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        slices = [member_slice(adapter, values, member) for member in range(adapter.members)]
        return {name: torch.stack([one[name] for one in slices]) for name in slices[0]}

    return MemberMixture(stacked(posterior.mean()), stacked(scales), weights)


def pool_adapter(model: BayesianModel) -> LoRAPool:
    """The pool of a model.

    Raises:
        ValueError: the model has none, or other adapters beside it.
    """
    if len(model.adapters) != 1 or not isinstance(model.adapters[0], LoRAPool):
        kinds = ", ".join(type(adapter).__name__ for adapter in model.adapters)
        raise ValueError(f"Only a pool of LoRAs is merged for a task; this model's adapters are {kinds}. See pool_of.")
    return model.adapters[0]


@dataclass(frozen=True)
class TaskMerging:
    """How a pool is merged for the tasks of a batch of episodes, from their labelled images alone.

    Usage::

        merging = TaskMerging(pool_posterior, MergeRule(sharpness=8.0))
        weights = merging.weights(batch, torch.Generator().manual_seed(0))         # (episodes, members)
        log_probs = merging.target(batch, weights)(batch["pixel_values"])

    Every member is scored on augmented copies of the labelled images, with prototypes of the images as they are; one score
    serves all layers. What the weights mean is chosen by ``semantics``:

    - ``"mean"``: one network, the mean of the members' weight matrices (AMT);
    - ``"mixture"``: the mean of the members' predictions, a forward for each;
    - ``"dirichlet"``: the mean of predictions over networks whose merge weights are drawn from a Dirichlet around them.

    All three are expectations over merge weights, of which a Dirichlet of large concentration is the first and one of
    vanishing concentration the second. With the weight on one member they coincide.

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, equations 6 to 8 and algorithm 2.

    Args:
        posterior: of a pool, on a task of episodes.
        rule: from similarities to weights.
        augmentation: of the labelled images that are scored; None scores the images themselves, which with one shot tells
            members apart by other classes only.
        attack: on the pixels of the scored images, against each member by itself; None scores them as they are, as published,
            which prefers members that were fitted to weak attacks.
        copies: augmented copies of each labelled image.
        trim: truncation of the merged weights, of each merge by itself; None for none.
        semantics: one of the above.
        concentration: of the Dirichlet, the sum over members.
        weight_draws: draws of the Dirichlet.

    Raises:
        ValueError: no pool, no episodes, or a setting out of range.
        TypeError: a rule, an augmentation, an attack or a truncation that is none.
    """

    posterior: Posterior
    rule: MergeRule = field(default_factory=MergeRule)
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    attack: PGD | None = None
    copies: int = 1
    trim: Trim | None = None
    semantics: str = "mean"
    concentration: float = 10.0
    weight_draws: int = 8

    def __post_init__(self) -> None:
        pool_adapter(self.posterior.model)
        if not isinstance(self.posterior.model.head, PrototypeHead):
            raise ValueError(
                f"A pool is merged from the labelled images of an episode, and {self.posterior.model.task.name!r} has none. "
                "Use episodic(task)."
            )
        check_numbers(self)
        for name, kind, optional, example in (
            ("rule", MergeRule, False, "MergeRule(sharpness=8.0)"),
            ("augmentation", Augmentation, True, "Augmentation()"),
            ("attack", PGD, True, "PGD(0.03)"),
            ("trim", Trim, True, "Trim(0.5)"),
        ):
            given = getattr(self, name)
            if not (isinstance(given, kind) or (optional and given is None)):
                raise TypeError(
                    f"{name} is a {type(given).__name__}; expected {kind.__name__}, such as {example}"
                    f"{', or None' if optional else ''}."
                )
        if self.semantics not in SEMANTICS:
            raise ValueError(
                f"Unknown semantics {self.semantics!r} of merge weights. Did you mean "
                f"{nearest(self.semantics, SEMANTICS)!r}? Semantics: {', '.join(SEMANTICS)}."
            )
        for name in ("copies", "weight_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not self.concentration > 0:
            raise ValueError(f"The concentration of a Dirichlet must be positive; got {self.concentration}. Try 10.")

    @property
    def points(self) -> int:
        """Merge weights that one prediction averages over."""
        return {"mean": 1, "mixture": pool_adapter(self.posterior.model).members, "dirichlet": self.weight_draws}[
            self.semantics
        ]

    @torch.no_grad()
    def similarity(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines of the scored images with the prototypes under every member at its mean, and the images' labels.

        Args:
            batch: whole episodes.
            generator: seeds the augmentation, and the start of an attack.

        Shape:
            ``(episodes, members, images, ways)`` and ``(episodes, images)``
        """
        model = self.posterior.model
        adapter, head = pool_adapter(model), model.head
        assert isinstance(head, PrototypeHead)
        device, ways = model.backbone.device, head.form.ways
        support, labels = batch["support"].to(device), batch["support_labels"].to(device)
        episodes, shown = labels.shape
        scored = support
        if self.augmentation is not None:
            scored = torch.cat([self.augmentation(support, generator) for _ in range(self.copies)], dim=1)
        each = torch.eye(adapter.members, device=device, dtype=model.backbone.site_dtype)
        model.bind(batch, {**self.posterior.mean(), adapter.weights_name: each.repeat_interleave(episodes, 0)})

        def of_members(images: Tensor) -> Tensor:
            return images.repeat(adapter.members, *[1] * (images.dim() - 1))

        local = of_members(labels)
        scored_labels = labels.repeat(1, scored.shape[1] // shown)
        prototypes = class_prototypes(head.features(of_members(support)), local, ways)
        images = of_members(scored)
        if self.attack is not None:

            def logits(attacked: Tensor) -> Tensor:
                return head.form.scale * cosine_similarity(head.features(attacked), prototypes)

            # every member meets the worst case of its own
            images = self.attack(images, cross_entropy_objective(logits, of_members(scored_labels)), generator)
        found = cosine_similarity(head.features(images), prototypes)
        model.release()
        return found.unflatten(0, (adapter.members, episodes)).transpose(0, 1), scored_labels

    def weights(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Merge weights of every episode, ``(episodes, members)``; see `similarity` for the arguments."""
        return self.rule(*self.similarity(batch, generator))

    def spread(self, weights: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Merge weights that the semantics average over, and the probability of each.

        Args:
            weights: of every episode.
            generator: seeds the draws of a Dirichlet.

        Shape:
            weights ``(episodes, members)``; returns ``(points, episodes, members)`` and ``(points, episodes)``
        """
        if self.semantics == "mean":
            return weights[None], torch.ones_like(weights[None, :, 0])
        if self.semantics == "mixture":
            members = weights.shape[-1]
            each = torch.eye(members, dtype=weights.dtype, device=weights.device)
            return each[:, None].expand(members, *weights.shape), weights.T
        shape = (self.concentration * weights.double().cpu()).expand(self.weight_draws, *weights.shape)
        # G(a) = G(a + 1) U^(1 / a) in logarithm: where a is small every gamma variable would round to zero
        uniform = torch.rand(shape.shape, generator=generator, dtype=torch.float64)
        logs = torch._standard_gamma(shape + 1, generator).log() + uniform.clamp_min(TINY).log() / shape
        points = logs.masked_fill(shape == 0, -torch.inf).softmax(-1)
        equal = torch.full(points.shape[:2], 1 / self.weight_draws)
        return points.to(weights), equal.to(weights)

    def target(
        self,
        batch: Mapping[str, Tensor],
        weights: Tensor,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> AttackTarget:
        """The merged prediction of a batch as a function of its queries' pixels.

        Args:
            batch: whole episodes.
            weights: of every episode.
            draws: draws of the members' factors; 1 takes their mean.
            generator: seeds draws.

        Shape:
            weights ``(episodes, members)``
        """
        model, adapter = self.posterior.model, pool_adapter(self.posterior.model)
        points, shares = self.spread(weights, generator)
        factors = self.posterior.mean() if draws == 1 else self.posterior.sample(draws, generator=generator)
        # draws outermost, then points, then episodes, as rows are repeated
        whole = points.repeat(draws, 1, 1)
        draw = {**factors, adapter.weights_name: whole.flatten(0, 1)}
        finish = None
        if self.trim is not None:
            finish = partial(
                trimmed_deltas, backbone=model.backbone, trim=self.trim, runs=whole.shape[0] * whole.shape[1]
            )
        queries = len(batch["labels"]) // len(weights)
        of_rows = shares.repeat(draws, 1).repeat_interleave(queries, dim=1) / draws
        return AttackTarget(model, batch, draw, len(whole), shares=of_rows, finish=finish)
