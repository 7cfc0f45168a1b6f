"""Instance-wise LoRA: experts side by side along the rank, weighed for each sequence by a gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet, RelaxedOneHotCategorical
from torch.nn import functional

from pyrolora.models.adapters.base import site_linear
from pyrolora.models.adapters.gated import MissingGate, RankGate, over_rank
from pyrolora.models.adapters.lora import LoRA
from pyrolora.models.backbones import PROMPT, Backbone
from pyrolora.models.naming import nearest
from pyrolora.models.sites import Site

VARIANTS = ("code", "paper")
GATES = ("deterministic", "dirichlet", "concrete", "categorical")


@dataclass(frozen=True)
class MixtureLoRA(LoRA):
    """``y = W x + s sum_k w_k(z) B_k A_k x``: K experts of rank r/K whose weights a gate makes from a row's vector z.

    Usage::

        adapter = MixtureLoRA(rank=8, alpha=16, experts=4)                     # task("next_item") has z, a SASRec state
        adapter = MixtureLoRA(rank=8, experts=4, gate_input="prompt")          # any text: the mean embedding of the prompt
        posterior = SVI(guide={"*.lora_*": Point(), "gate.weight": MeanField()}).fit(model, task.train)   # Bayesian gate

    Beside LoRA's sites there is ``gate.weight`` with dims ``(expert, gate_feature)``: ``w(z) = softmax(gate.weight
    LayerNorm(z))``, one w for all layers. It has a prior and a posterior like any other, which makes a Bayesian gate.
    LayerNorm (without weights of its own) keeps a long z from choosing one expert alone; it also keeps rows apart, as the
    released gate's BatchNorm does not.

    How w comes from its mean ``p = softmax(...)``:

    - ``"deterministic"``: w = p, the paper's.
    - ``"dirichlet"``: w ~ Dirichlet(concentration p), drawn for every row in training and in predictions over draws.
    - ``"concrete"``: w ~ RelaxedOneHotCategorical(temperature, p), likewise.
    - ``"categorical"``: one expert k ~ p a row, summed out exactly, so that the network runs K times: the *class
      probabilities* of K LoRAs of rank r/K are mixed, a mixture of predictions and not of weights.

    A drawn w is independent of the labels given z: its part of the guide is its own conditional, the bound is the expected
    log-likelihood under it, and no KL is paid. Predictions of kind ``"mean"`` and curvature use w = p; linearised
    predictions and last-layer methods, which cannot hold what is drawn for single rows, refuse it.

    Expert numbers mean nothing: a permutation of slices of A, B and rows of the gate changes no output, so nothing may be
    averaged by number over fits or chains.

    Source: Kong et al., "Customizing Language Models with Instance-wise LoRA for Sequential Recommendation", 2024,
    equations 9 to 12.

    Args:
        rank: of all experts together.
        alpha: see ``variant``.
        targets: see `LoRA`.
        layers: see `LoRA`.
        name: see `LoRA`.
        experts: number of experts K; one is plain LoRA and has no gate.
        gate: ``"deterministic"``, ``"dirichlet"``, ``"concrete"`` or ``"categorical"``.
        gate_input: entry of the batch that z is, such as any of `Example.vectors`, or ``"prompt"`` for the mean input
            embedding of the prompt, which images do not have. A task of recommendations also has ``"random_sequence"``,
            which tells nothing, as a control.
        gate_features: width of z; not used for ``"prompt"``, which is as wide as the network's embeddings.
        variant: ``"code"`` multiplies by ``alpha / (rank / experts)``, so that equal weights are plain LoRA; ``"paper"`` by
            ``alpha / rank``, so that they are LoRA with ``alpha / experts``.
        concentration: of ``"dirichlet"``; the variance of a weight is ``p (1 - p) / (concentration + 1)``.
        temperature: of ``"concrete"``; towards 0 one expert is drawn.

    Raises:
        ValueError: experts that do not divide the rank, or a setting out of range; the nearest name is offered.
    """

    experts: int = field(default=4, metadata={"help": "number of experts; they share the rank"})
    gate: str = field(default="deterministic", metadata={"help": ", ".join(GATES)})
    gate_input: str = field(default="sequence", metadata={"help": "batch entry that the gate reads, or 'prompt'"})
    gate_features: int = field(default=64, metadata={"help": "width of that entry"})
    variant: str = field(
        default="code", metadata={"help": "scale: alpha / (rank / experts), or the paper's alpha / rank"}
    )
    concentration: float = field(default=10.0, metadata={"help": "of gate='dirichlet'"})
    temperature: float = field(default=1.0, metadata={"help": "of gate='concrete'"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, valid in (("variant", VARIANTS), ("gate", GATES)):
            given = getattr(self, setting)
            if given not in valid:
                raise ValueError(
                    f"Unknown {setting} {given!r} for MixtureLoRA. Did you mean {nearest(str(given), valid)!r}? "
                    f"Choices: {', '.join(valid)}."
                )
        if self.experts < 1 or self.rank % self.experts:
            raise ValueError(
                f"{self.experts} experts cannot share the rank {self.rank}: each has rank / experts. Choose experts among "
                f"{', '.join(str(count) for count in range(1, self.rank + 1) if self.rank % count == 0)}."
            )
        if self.gate_features < 1:
            raise ValueError(f"gate_features must be at least 1; got {self.gate_features}. A SASRec state has 64.")
        for setting in ("concentration", "temperature"):
            if not getattr(self, setting) > 0:
                raise ValueError(f"{setting} must be positive; got {getattr(self, setting)}. Try 1.0.")

    @property
    def scaling(self) -> float:
        """What multiplies the gated product."""
        return self.alpha / (self.rank // self.experts if self.variant == "code" else self.rank)

    @property
    def gate_site(self) -> str:
        """Name of the gate's site."""
        return f"{self.name}.gate.weight" if self.name else "gate.weight"

    @property
    def context_keys(self) -> tuple[str, ...]:
        """See `Adapter.context_keys`."""
        return (self.gate_input,) if self.experts > 1 else ()

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`: LoRA's, and the gate's where there is more than one expert.

        Raises:
            ValueError: see `LoRA`; or a gate that reads the prompt of a network of images.
        """
        sites = super().sites(backbone, classes)
        if self.experts == 1:
            return sites
        if self.gate_input == PROMPT and "image" in backbone.formats:
            raise ValueError(
                f"gate_input='prompt' is the mean embedding of a text, and {backbone.name!r} reads images. Give "
                "every example a vector, as in replace(example, vectors={'state': z}), and set gate_input='state'."
            )
        features = backbone.embedding_size if self.gate_input == PROMPT else self.gate_features
        shape = torch.Size((self.experts, features))
        return (*sites, Site(self.gate_site, shape, ("expert", "gate_feature")))

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: LoRA's start, and the gate uniform in +-1/sqrt(features)."""
        start = super().initial(backbone, [site for site in sites if site.modules], generator)
        for site in sites:
            if site.name == self.gate_site:
                bound = site.shape[-1] ** -0.5
                value = torch.empty(site.shape, dtype=backbone.site_dtype).uniform_(-bound, bound, generator=generator)
                start[site.name] = value.to(backbone.device)
        return start

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """See `Adapter.relative_scales`: for equal weights; the gate's is 1/sqrt(features), logits of about one."""
        plain = LoRA(rank=self.rank, alpha=self.scaling * self.rank / self.experts)
        scales = plain.relative_scales(backbone, [site for site in sites if site.modules], constants, ratio)
        for site in sites:
            if site.name == self.gate_site:
                scales[site.name] = torch.tensor(site.shape[-1] ** -0.5).to(backbone.device, backbone.site_dtype)
        return scales

    def gate_logits(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Logits of the experts for each row, or None where the batch holds nothing to read.

        Args:
            values: what `Adapter.deltas` takes.

        Shape:
            ``(rows, experts)``

        Raises:
            ValueError: vectors of another width than the gate's.
        """
        read, weight = values.get(self.gate_input), values[self.gate_site]
        if read is None:
            return None
        # noise for each token stands in for a weight without a shape
        width = read.shape[-1] if not isinstance(weight, Tensor) else weight.shape[-1]
        if read.dim() != 2 or read.shape[-1] != width:
            raise ValueError(
                f"The batch entry {self.gate_input!r} has the shape {tuple(read.shape)}; the gate expects one vector of "
                f"{width} numbers a row. Give MixtureLoRA gate_features={read.shape[-1]}, or vectors of that width."
            )
        rows = functional.layer_norm(read, read.shape[-1:])[:, None]
        return site_linear(rows, weight, self.gate_site)[:, 0]

    def rank_gate(self, draw: Mapping[str, Tensor]) -> RankGate:
        """See `LoRA.rank_gate`: the experts' weights of every row, spread over the rank."""
        if self.experts == 1:
            return None
        drawn = draw.get(self._drawn)
        if drawn is None:
            logits = self.gate_logits(draw)
            if logits is None:
                return MissingGate("MixtureLoRA", self.gate_input)
            drawn = self._one_hot(logits) if self.gate == "categorical" else logits.softmax(-1)
        return over_rank(drawn, self.rank)

    def _one_hot(self, logits: Tensor) -> Tensor:
        """Every expert alone for every row, rows first."""
        return torch.eye(self.experts, dtype=logits.dtype, device=logits.device).repeat(logits.shape[0], 1)

    @property
    def _drawn(self) -> str:
        return f"{self.gate_site}.drawn"

    @property
    def draws_locally(self) -> bool:
        """See `Adapter.draws_locally`."""
        return self.experts > 1 and self.gate in ("dirichlet", "concrete")

    def local_draw(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Adapter.local_draw`: the experts' weights of ``"dirichlet"`` and ``"concrete"`` gates."""
        if not self.draws_locally:
            return {}
        logits = self.gate_logits(values)
        if logits is None:
            raise MissingGate("MixtureLoRA", self.gate_input).error()
        if self.gate == "concrete":
            temperature = logits.new_tensor(self.temperature)
            return {self._drawn: RelaxedOneHotCategorical(temperature, logits=logits, validate_args=False).rsample()}
        # a concentration of zero has no density
        concentration = (self.concentration * logits.softmax(-1)).clamp_min(torch.finfo(logits.dtype).tiny ** 0.5)
        return {self._drawn: Dirichlet(concentration, validate_args=False).rsample()}

    @property
    def enumerates(self) -> bool:
        """See `Adapter.enumerates`: under a ``"categorical"`` gate."""
        return self.experts > 1 and self.gate == "categorical"

    def enumerated(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """See `Adapter.enumerated`: log probabilities of the experts under a ``"categorical"`` gate."""
        if not self.enumerates:
            return None
        logits = self.gate_logits(values)
        if logits is None:
            raise MissingGate("MixtureLoRA", self.gate_input).error()
        return logits.log_softmax(-1)

    def diagnostics(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Adapter.diagnostics`: mean entropy of the experts' probabilities, nats; log K is no choice."""
        logits = self.gate_logits(draw) if self.experts > 1 else None
        if logits is None:
            return {}
        log_probs = logits.detach().log_softmax(-1)
        return {"gate_entropy": float(-(log_probs.exp() * log_probs).sum(-1).mean())}

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Any:
        """See `Adapter.to_peft`: exact for one expert, None for more, whose weights differ from row to row."""
        return super().to_peft(backbone, sites, draw, constants) if self.experts == 1 else None
