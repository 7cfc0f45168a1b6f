"""How much each member of a pool counts for a task: intra- and inter-class similarity of the support set."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers

VARIANTS = ("code", "paper")


def class_scores(similarity: Tensor, labels: Tensor, variant: str = "code") -> tuple[Tensor, Tensor]:
    """Mean cosine of examples with their own class's prototype, and with the others'.

    Usage::

        intra, inter = class_scores(cosine_similarity(augmented, prototypes), labels)

    With one example a class and no augmentation every example *is* its prototype, so the first score is 1 whatever the
    features; score augmented copies of the examples instead.

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, equations 6 and 7.

    Args:
        similarity: cosines of labelled examples with the prototypes.
        labels: classes of the examples.
        variant: ``"code"`` averages over the other classes, as the released code; ``"paper"`` sums over them.

    Shape:
        similarity ``(..., examples, ways)``, labels ``(..., examples)``; returns two of ``(...)``

    Raises:
        ValueError: an unknown variant, or fewer than two classes.
    """
    _check_variant(variant)
    ways = similarity.shape[-1]
    if ways < 2:
        raise ValueError(
            f"Members are told apart by what separates classes, and there is {ways} class; give 2 or more."
        )
    own = similarity.gather(-1, labels[..., None].expand(*similarity.shape[:-1], 1))[..., 0]
    others = similarity.sum(-1) - own
    return own.mean(-1), (others / (ways - 1) if variant == "code" else others).mean(-1)


@dataclass(frozen=True)
class MergeRule:
    """From similarities of a support set under each member to weights on the simplex.

    ``s = intra C - (1 - intra) V`` for the scores of `class_scores`, ``w = exp(-sharpness (1 - s))``, the ``top`` largest
    kept and normalised: a categorical posterior over the members under a uniform prior, tempered and cut to its leading
    members.

    Usage::

        weights = MergeRule(intra=0.6, sharpness=8.0, top=2)(similarity, labels)

    Source: "Mixture of Adversarial LoRAs" (AMT), 2024, equation 8 and algorithm 2; the defaults are the released code's.

    Args:
        intra: the paper's lambda, weight of the similarity within classes, in [0, 1].
        sharpness: the paper's beta, inverse temperature of the weights; 0 weighs the leading members equally.
        top: members that may count.
        variant: see `class_scores`.

    Raises:
        ValueError: a setting out of range.
    """

    intra: float = field(default=0.6, metadata={"help": "lambda, weight of the similarity within classes"})
    sharpness: float = field(default=1.0, metadata={"help": "beta, inverse temperature of the weights"})
    top: int = field(default=2, metadata={"help": "members that may count"})
    variant: str = field(default="code", metadata={"help": "'code' or 'paper'"})

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.intra <= 1:
            raise ValueError(f"intra is a weight in [0, 1]; got {self.intra}. The released code has 0.6.")
        if not self.sharpness >= 0:
            raise ValueError(f"sharpness must not be negative; got {self.sharpness}. Try 1, or 0 for equal weights.")
        if self.top < 1:
            raise ValueError(f"At least one member must count; got top={self.top}. The published choice is 2.")
        _check_variant(self.variant)

    def score(self, similarity: Tensor, labels: Tensor) -> Tensor:
        """The score ``s`` of each member; see `class_scores` for the arguments.

        Shape:
            similarity ``(..., members, examples, ways)``, labels ``(..., examples)``; returns ``(..., members)``
        """
        labels = labels[..., None, :].expand(similarity.shape[:-1])
        intra, inter = class_scores(similarity, labels, self.variant)
        return self.intra * intra - (1 - self.intra) * inter

    def weights(self, scores: Tensor) -> Tensor:
        """Weights on the simplex, zero outside the leading members.

        Shape:
            ``(..., members)``, in and out

        Raises:
            ValueError: fewer members than may count.
        """
        members = scores.shape[-1]
        if self.top > members:
            raise ValueError(
                f"top={self.top} members are to count, and the pool has {members}; choose at most {members}."
            )
        leading, places = scores.topk(self.top, dim=-1)
        shares = (self.sharpness * leading).softmax(-1)
        return torch.zeros_like(scores).scatter(-1, places, shares)

    def __call__(self, similarity: Tensor, labels: Tensor) -> Tensor:
        """`weights` of `score`."""
        return self.weights(self.score(similarity, labels))


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"Unknown variant {variant!r} of the inter-class score. Did you mean {nearest(variant, VARIANTS)!r}? "
            f"Variants: {', '.join(VARIANTS)}."
        )
