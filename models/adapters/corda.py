"""CorDA: low-rank adapters oriented by the second moments of what the network reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pyrolora.models.adapters.centred import CentredLowRank, weights_of
from pyrolora.models.backbones import Backbone
from pyrolora.models.calibration import calibration_batches
from pyrolora.models.factorisation import context_factors
from pyrolora.models.moments import SecondMoments, second_moments
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

MODES = ("instruction", "knowledge")


@dataclass(frozen=True)
class CorDA(CentredLowRank):
    """Trains the components that matter most (or least) on calibration text.

    Usage::

        BayesianModel(backbone, task, adapter=CorDA(rank=8))                                  # calibrated on the task
        BayesianModel(backbone, task, adapter=CorDA(mode="knowledge", calibration="notes.txt"))

    ``W C = U S V'`` with C the second moment of the inputs. ``mode="instruction"`` (instruction-previewed) trains the first
    components, with C from text of the task; ``mode="knowledge"`` (knowledge-preserved) trains the last, with C from text
    whose answers are to survive. Prompts of the training split calibrate by default: a prior that has seen the inputs, not
    the labels.

    C's overall scale is arbitrary and, in the published factors, ends up in the ratio of A to B (0.03 to 226 on a 135M
    model), which decides how fast each trains and what one prior scale means. ``balanced`` gives both the same size.

    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024.

    Args:
        rank: number of components.
        alpha: numerator of the scaling ``alpha / rank``; None for the rank, a scaling of 1 as published.
        targets: see `LoRA`.
        layers: see `LoRA`.
        name: see `LoRA`.
        form: see `CentredLowRank`.
        mode: ``"instruction"`` or ``"knowledge"``.
        calibration: text file, task, or file of `SecondMoments`; None for the model's own training prompts.
        samples: rows of calibration text.
        tokens: tokens of a row cut from a text file.
        damping: added to C's diagonal, relative to its mean.
        balanced: give A and B equal size; False for the published factors.
        seed: seeds the choice of calibration rows.

    Raises:
        ValueError: an unknown mode, knowledge mode without calibration text, or what `CentredLowRank` refuses.
    """

    by_position: ClassVar = True

    alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "numerator of the scaling; None for the rank"}
    )
    mode: str = field(default="instruction", metadata={"help": "'instruction' or 'knowledge'"})
    calibration: str | None = field(
        default=None, metadata={"help": "text file, task or file of second moments; None for the model's own task"}
    )
    samples: int = field(default=256, metadata={"help": "rows of calibration text"})
    tokens: int = field(default=512, metadata={"help": "tokens of a row cut from a text file"})
    damping: float = field(default=0.01, metadata={"help": "added to the diagonal, relative to its mean"})
    balanced: bool = field(default=True, metadata={"help": "give A and B equal size"})
    seed: int = field(default=0, metadata={"help": "seed of the choice of rows"})

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(
                f"Unknown mode {self.mode!r}. Did you mean {nearest(self.mode, MODES)!r}? Modes: {', '.join(MODES)}."
            )
        if self.mode == "knowledge" and self.calibration is None:
            raise ValueError(
                'CorDA(mode="knowledge") preserves what calibration text shows, and the task itself is what will change. '
                'Name other text, as in calibration="notes.txt" or calibration="mmlu_college_chemistry".'
            )
        for name in ("samples", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not self.damping > 0:
            raise ValueError(f"damping must be positive; got {self.damping}. The published value is 0.01.")

    def factors(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """See `CentredLowRank.factors`."""
        weights = weights_of(backbone, sites)
        return self.factors_from(self.moments(backbone, list(weights), calibration), weights)

    def moments(
        self, backbone: Backbone, paths: Sequence[str], calibration: "Calibration | None" = None
    ) -> SecondMoments:
        """Second moments of the calibration text, collected or read.

        Args:
            backbone: the frozen network.
            paths: module paths of the adapted projections.
            calibration: examples of the model's own task.
        """
        if self.calibration is not None and self.calibration.endswith(".safetensors"):
            return SecondMoments.load(self.calibration)
        batches = calibration_batches(backbone, self.calibration, calibration, self.samples, self.seed, self.tokens)
        return second_moments(backbone, batches, paths)

    def factors_from(self, moments: SecondMoments, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """A0 and B0 from moments collected before, by module path; weights ``(out, in)``, moments ``(in, in)``."""
        found = {}
        for path, weight in weights.items():
            # condition numbers of 1e7 are usual, and float32 has no digits left for the inverse
            found[path] = context_factors(
                weight.to(torch.float64), moments[path].to(weight.device, torch.float64), self.rank, self.scaling,
                leading=self.mode == "instruction", damping=self.damping, balanced=self.balanced,
            )  # fmt: skip
        return found
