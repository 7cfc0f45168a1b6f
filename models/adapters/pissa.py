"""PiSSA: low-rank adapters that start from the principal singular components."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pyrolora.models.adapters.centred import CentredLowRank, weights_of
from pyrolora.models.backbones import Backbone
from pyrolora.models.factorisation import principal_factors
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration


@dataclass(frozen=True)
class PiSSA(CentredLowRank):
    """Trains the largest singular components of each weight: ``s B0 A0 = U_r S_r V_r'``.

    Usage::

        BayesianModel(backbone, task, adapter=PiSSA(rank=8), prior=Relative(0.1))

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024, equations 2 to 4.

    Args:
        rank: number of singular components.
        alpha: numerator of the scaling ``alpha / rank``; None for the rank, a scaling of 1 as published.
        targets: see `LoRA`.
        layers: see `LoRA`.
        name: see `LoRA`.
        form: see `CentredLowRank`.
        iterations: power iterations of a randomised decomposition, as in PEFT's ``pissa_niter_16``; None for the exact one.
        seed: seeds the randomised decomposition.

    Raises:
        ValueError: a negative number of iterations, or what `CentredLowRank` refuses.
    """

    by_position: ClassVar = True

    alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "numerator of the scaling; None for the rank"}
    )
    iterations: int | None = field(
        default=None, metadata={"help": "power iterations of a randomised decomposition; None for the exact one"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the randomised decomposition"})

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        super().__post_init__()
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(
                f"iterations must not be negative; got {self.iterations}. Try 16, or None for the exact decomposition."
            )

    def factors(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """See `CentredLowRank.factors`."""
        generator = torch.Generator().manual_seed(self.seed)
        return {
            path: principal_factors(weight, self.rank, self.scaling, iterations=self.iterations, generator=generator)
            for path, weight in weights_of(backbone, sites).items()
        }
