"""Low-rank adapters that start from factors of the frozen weight, written as changes of those factors."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import site_linear
from pyrolora.models.adapters.gated import RankGate, gated
from pyrolora.models.adapters.lora import LoRA, lora_config, stored_weight, weight_norms
from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

FORMS = ("difference", "fixed_B", "subspace")


@dataclass(frozen=True)
class CentredLowRank(LoRA, abstract=True):
    """``y = W x + s (B A - B0 A0) x`` with the sites ``lora_A = A - A0`` and ``lora_B = B - B0``.

    The sites are changes, so a zero-mean prior or weight decay pulls towards the pretrained network (towards the factors
    themselves it would pull towards W with its adapted components cut out). The change is computed as
    ``s (B0 (dA x) + dB (A0 + dA) x)``: at the start every term is a product with zero, so nothing is rounded in any float
    type, and W is never touched. A0 and B0 are constants of the model, kept with its posteriors.

    Under a prior centred at (A0, B0) a stochastic A and a point B are BLoB's posterior over weights only where the centre
    does not move with B. Two forms keep it in place: ``fixed_B`` leaves B at B0, and ``subspace`` learns ``s B dA`` with B
    started at B0.

    Args:
        form: ``"difference"``, ``"fixed_B"`` or ``"subspace"``.

    Raises:
        ValueError: an unknown form, or what `LoRA` refuses.
    """

    form: str = field(default="difference", metadata={"help": "'difference', 'fixed_B' or 'subspace'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(
                f"Unknown form {self.form!r}. Did you mean {nearest(self.form, FORMS)!r}? Forms: {', '.join(FORMS)}."
            )

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `LoRA.sites`; with ``fixed_B`` there is no site of B."""
        sites = super().sites(backbone, classes)
        return tuple(site for site in sites if self.form != "fixed_B" or site.name.endswith("lora_A"))

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: no change."""
        return {site.name: torch.zeros(site.shape, dtype=backbone.site_dtype, device=backbone.device) for site in sites}

    @abstractmethod
    def factors(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None"
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A0 and B0 of every adapted projection, by module path."""

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `Adapter.constants`: A0 and B0 stacked as the sites are, each under its site's name and ``.start``."""
        placed = self.stacked(self.factors(backbone, sites, calibration), sites)
        return {name: value.to(backbone.device, backbone.site_dtype) for name, value in placed.items()}

    def stacked(self, factors: Mapping[str, tuple[Tensor, Tensor]], sites: Sequence[Site]) -> dict[str, Tensor]:
        """Constants from factors by module path."""
        found = {}
        for site in _of_a(sites):
            pairs = [factors[path] for path in site.modules]
            for name, stack in zip(start_names(site), zip(*pairs, strict=True), strict=True):
                found[name] = torch.stack(stack)
        return found

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`."""
        changes: dict[str, Delta] = {}
        gate = self.rank_gate(draw)
        for site in _of_a(sites):
            other = up_name(site)
            starts = [draw[name].unbind(0) for name in start_names(site)]
            downs = stack_entries(draw[site.name], site.name)
            ups: Sequence[Tensor | None] = [None] * len(downs)
            if self.form != "fixed_B":
                ups = stack_entries(draw[other], other)
            for entry, path in enumerate(site.modules):
                names, start = (site.name, other), (starts[0][entry], starts[1][entry])
                inner = self.form == "difference"
                changes[path] = _CentredDelta(*start, downs[entry], ups[entry], self.scaling, inner, names, entry, gate)
        return changes

    def centres(self, sites: Sequence[Site], constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Adapter.centres`: A0 and B0, except where B itself is the site."""
        found = {}
        for site in _of_a(sites):
            a, b = (constants[name] for name in start_names(site))
            found[site.name] = a
            if self.form == "difference":
                found[up_name(site)] = b
        return {} if self.form == "subspace" else found

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: whitened, so that every component may change the output equally.

        With ``sigma_A,i = tau / |B0_i|`` and ``sigma_B,i = tau / |A0_i|`` the change has, to first order,
        ``E |dW|^2 = s^2 tau^2 rank (in + out)``; for balanced factors both are ``tau / sqrt(S_i / s)``.
        """
        scales = {}
        for site in _of_a(sites):
            a, b = (constants[name] for name in start_names(site))
            # a component of no size moves nothing to first order, and its scale would be infinite
            size_a, size_b = (
                size.clamp_min(1e-6 * size.amax(-1, keepdim=True).clamp_min(1e-30))
                for size in (torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-2))
            )
            sides = a.shape[-1] + (b.shape[-2] if self.form == "difference" else 0)
            tau = ratio * weight_norms(backbone, site)[..., 0] / (self.scaling * (self.rank * sides) ** 0.5)
            scales[site.name] = (tau / size_b)[..., None]
            if self.form == "difference":
                scales[up_name(site)] = (tau / size_a)[..., None, :]
            elif self.form == "subspace":
                # B has no first-order effect there; each of its columns may change by the same ratio
                scales[up_name(site)] = (ratio * size_b / b.shape[-2] ** 0.5)[..., None, :]
        return scales

    def as_lora(
        self, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same change as a product on W, ``s [B, -B0] [A; A0]``, of rank 2r (r where the form has one product).

        Args:
            sites: what `sites` returned.
            draw: site name -> value, maybe with leading dimensions of draws, so that posteriors convert draw by draw.
            constants: what `constants` returned.

        Returns:
            Names of both sites -> factors of a `LoRA` with this scaling and the larger rank.
        """
        converted = {}
        for site in _of_a(sites):
            a0, b0 = (constants[name] for name in start_names(site))
            change = draw[site.name]
            a0, b0 = a0.expand(*change.shape[:-2], *a0.shape[-2:]), b0.expand(*change.shape[:-2], *b0.shape[-2:])
            b = b0 if self.form == "fixed_B" else b0 + draw[up_name(site)]
            if self.form == "difference":
                converted[site.name] = torch.cat([a0 + change, a0], dim=-2)
                converted[up_name(site)] = torch.cat([b, -b0], dim=-1)
            else:
                converted[site.name], converted[up_name(site)] = change, b
        return converted

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Adapter.to_peft`: a plain LoRA on the pretrained network, which no residual weights have to accompany."""
        converted = self.as_lora(sites, draw, constants)
        weights = {}
        for site in _of_a(sites):
            for name, factor in ((site.name, "lora_A"), (up_name(site), "lora_B")):
                for path, value in zip(site.modules, converted[name].unbind(0), strict=True):
                    weights[f"base_model.model.{path}.{factor}.weight"] = value
        adapted = _of_a(sites)
        return {**lora_config(adapted), "r": self.peft_rank, "lora_alpha": self.scaling * self.peft_rank}, weights

    @property
    def peft_rank(self) -> int:
        """Rank of the products that `as_lora` makes."""
        return self.rank * (2 if self.form == "difference" else 1)


@dataclass(frozen=True)
class _CentredDelta:
    """The change of one projection; factors of several members side by side along the rank share one (A0, B0)."""

    down_start: Tensor
    up_start: Tensor
    down: Tensor
    up: Tensor | None
    scale: float
    through_start: bool
    names: tuple[str, str]
    entry: int
    gate: RankGate = None

    def __call__(self, rows: Tensor) -> Tensor:
        narrow = site_linear(rows, self.down, self.names[0], self.entry) * self.scale
        members = narrow.shape[-1] // self.down_start.shape[-2]
        held = narrow if self.gate is None else gated(narrow, self.gate)
        if members > 1:
            held = held.unflatten(-1, (members, -1)).sum(-2)
        change = functional.linear(held, self.up_start)
        if self.up is not None:
            if self.through_start:
                start = functional.linear(rows.to(narrow.dtype), self.down_start) * self.scale
                narrow = narrow + (start.repeat(1, 1, members) if members > 1 else start)
            narrow = narrow if self.gate is None else gated(narrow, self.gate)
            change = change + site_linear(narrow, self.up, self.names[1], self.entry)
        return change.to(rows.dtype)


def start_names(site: Site) -> tuple[str, str]:
    """Names of the constants A0 and B0 of a site of A."""
    return f"{site.name}.start", f"{up_name(site)}.start"


def up_name(site: Site) -> str:
    """Name of the site of B that belongs to a site of A."""
    return site.name.removesuffix("lora_A") + "lora_B"


def weights_of(backbone: Backbone, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The frozen weights that sites of A adapt, by module path."""
    return {path: stored_weight(backbone, path) for site in _of_a(sites) for path in site.modules}


def _of_a(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.name.endswith("lora_A")]
