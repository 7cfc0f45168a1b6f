"""PiSSA and LoftQ over a backbone whose weights are rounded to four bits."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyrolora.models.adapters.centred import CentredLowRank, weights_of
from pyrolora.models.adapters.lora import LoRA
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.naming import nearest
from pyrolora.models.quantisation import METHODS, quantised_factors
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration


@dataclass(frozen=True)
class QPiSSA(CentredLowRank):
    """``y = Q x + s B A x`` with Q the weight left after A0 and B0, rounded to NF4; the sites are changes of A0 and B0.

    Usage::

        adapter = QPiSSA(rank=16, iterations=5)
        quantised, constants = adapter.quantise(backbone)
        model = BayesianModel(quantised, task, adapter, constants=constants)

    ``Q + s B0 A0`` is near W, not equal to it, so this is no change of W: posteriors belong to the quantised backbone (its
    fingerprint is checked) and no PEFT file is written, which PEFT would put on W. The rounded weights are kept in the
    backbone's own float type.

    Args:
        rank: number of components.
        alpha: numerator of the scaling ``alpha / rank``; None for the rank.
        targets: see `LoRA`; only these projections are rounded.
        layers: see `LoRA`.
        name: see `LoRA`.
        form: only ``"difference"``.
        method: ``"pissa"`` or ``"loftq"``; see `quantised_factors`.
        iterations: alternations of rounding and decomposition.

    Raises:
        ValueError: an unknown method, another form, no iteration, or what `LoRA` refuses.
    """

    by_position: ClassVar = True

    alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "numerator of the scaling; None for the rank"}
    )
    method: str = field(default="pissa", metadata={"help": "'pissa' or 'loftq'"})
    iterations: int = field(default=5, metadata={"help": "alternations of rounding and decomposition"})

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        super().__post_init__()
        if self.form != "difference":
            raise ValueError(f"QPiSSA has no form {self.form!r}: its factors replace what was cut out of the weight.")
        if self.method not in METHODS:
            raise ValueError(
                f"Unknown method {self.method!r}. Did you mean {nearest(self.method, METHODS)!r}? "
                f"Methods: {', '.join(METHODS)}."
            )
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1; got {self.iterations}. Published runs use 5.")

    @torch.no_grad()
    def quantise(self, backbone: Backbone) -> tuple[Backbone, dict[str, Tensor]]:
        """A copy of a backbone with rounded weights, and the constants that belong to it.

        Args:
            backbone: the frozen network; it is not changed.
        """
        network = copy.deepcopy(backbone.network)
        sites = self.sites(backbone, None)
        factors = {}
        for path, weight in weights_of(backbone, sites).items():
            rounded, a, b = quantised_factors(
                weight, self.rank, self.scaling, method=self.method, iterations=self.iterations
            )
            stored: Any = network.get_submodule(path)
            stored.weight.copy_(rounded)
            factors[path] = (a, b)
        quantised = Backbone(network, backbone.tokenizer, f"{backbone.name} (nf4, {self.method})")
        return quantised, self.stacked(factors, sites)

    def factors(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """See `CentredLowRank.factors`.

        Raises:
            ValueError: always; the factors come with the quantised backbone.
        """
        raise ValueError(
            "QPiSSA's factors are what rounding left out, and a rounded weight does not tell. Make both at once, "
            "quantised, constants = adapter.quantise(backbone), and pass BayesianModel(quantised, ..., constants=constants)."
        )

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: the whole product, since Q lacks it."""
        whole = {site.name: draw[site.name] + draw[f"{site.name}.start"] for site in sites}
        return LoRA.deltas(self, sites, whole)

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Any:
        """See `Adapter.to_peft`: None, because PEFT would put the factors on the weight that was not rounded."""
        return None
