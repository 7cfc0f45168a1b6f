"""Low-rank adapters whose feed-forward channels form experts, weighed by a router that fades until it can be left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.active_entries import stack_entries
from pyrolora.models.adapters.base import PROGRESS, Adapter, site_linear
from pyrolora.models.adapters.gated import LowRankDelta
from pyrolora.models.adapters.lora import stored_weight, uniform_down
from pyrolora.models.adapters.targets import find_projections
from pyrolora.models.backbones import Backbone, Delta, OutputGate
from pyrolora.models.clustering import balanced_clusters
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

# projections that read one input and share one A, under the name of A's site
SHARED = {"qkv": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",), "fc1": ("fc1",), "fc2": ("fc2",)}
UP, ROUTER, EXPERT = "fc1", "fc1.router", "fc1.expert"


@dataclass(frozen=True)
class MoEfiedLoRA(Adapter):
    """EMTAL's adapter: LoRA on attention and feed-forward layers, whose hidden channels a router weighs in groups.

    Usage::

        model = BayesianModel(backbone, task("digits+mnist"), adapter=[MoEfiedLoRA(rank=4, experts=16), LastLayer()])
        posterior = MAP(steps=1000, retaining=QualityRetaining()).fit(model, model.task.train)
        network = merge(posterior)                     # a plain classifier; the router is gone

    The channels of each ``fc1`` are clustered once by the directions of their weights into experts of equal size. A router
    reads what ``fc1`` reads, token by token, and multiplies each expert's output, bias and LoRA included, by
    ``w = experts * softmax(W_r x / temperature)``, whose mean over the experts is 1. Nothing is permuted: an expert is an
    index for each channel. The experts share one A, so each owns its rows of ``fc1.lora_B`` and its columns of
    ``fc2.lora_A``.

    The router fades: ``w`` becomes ``(1 - a) w + a``, where a rises from 0 to 1 while training goes from ``fade_start`` to
    ``fade_end``. From there on, and wherever a batch does not say how far training is (its entry ``progress``, from 0 to 1),
    the network is a plain LoRA that can be merged without loss. A router at zero weighs all experts equally, and B is zero at
    the start: the network starts as it was.

    Sites are ``qkv.lora_A`` (one A for queries, keys and values), ``q_proj.lora_B``, ``k_proj.lora_B``, ``v_proj.lora_B``,
    ``o_proj.lora_*``, ``fc1.lora_*``, ``fc2.lora_*`` and, with two experts or more, ``fc1.router`` with dims
    ``(layer, expert, in_feature)``. The product ``B A`` is not scaled.

    Source: Zhong et al., "Transforming Vision Transformer: Towards Efficient Multi-Task Asynchronous Learner", 2024,
    equations 8 to 15. One A for all experts is what its parameter counts and its code have; the text has one for each.

    Args:
        rank: inner dimension of the products.
        experts: groups of hidden channels; 1 for none, which is the model after fading.
        temperature: divides the router's logits; above 1 it weighs more evenly.
        fade_start: share of training at which the router begins to fade.
        fade_end: share at which it is gone.
        layers: numbers of the blocks to adapt (negative from the last); None for all.

    Raises:
        ValueError: a setting out of range.
    """

    reads_examples: ClassVar = False

    rank: int = field(default=4, metadata={"help": "inner dimension of the products B A"})
    experts: int = field(default=16, metadata={"help": "groups of hidden channels; 1 for none"})
    temperature: float = field(default=5.0, metadata={"help": "divides the router's logits"})
    fade_start: float = field(default=0.0, metadata={"help": "share of training at which the router begins to fade"})
    fade_end: float = field(default=0.5, metadata={"help": "share of training at which the router is gone"})
    layers: tuple[int, ...] | None = field(default=None, metadata={"help": "blocks to adapt; None for all"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("rank", 4), ("experts", 16)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}. A usual choice is {usual}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}. The published value is 5.")
        if not 0 <= self.fade_start < self.fade_end <= 1:
            raise ValueError(
                f"The router fades from fade_start to fade_end, shares of training with 0 <= start < end <= 1; got "
                f"{self.fade_start} and {self.fade_end}. The released code fades from 0 to 0.5."
            )

    @property
    def context_keys(self) -> tuple[str, ...]:
        """See `Adapter.context_keys`: how far training is, where there is a router that fades."""
        return (PROGRESS,) if self.experts > 1 else ()

    def fade(self, progress: float) -> float:
        """How far the router has faded: 0 at the start, 1 once it is gone.

        Args:
            progress: share of training that is done.
        """
        return min(max((progress - self.fade_start) / (self.fade_end - self.fade_start), 0.0), 1.0)

    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """See `Adapter.sites`.

        Raises:
            ValueError: a network without these projections, experts that do not divide its channels, or a rank above the
                smaller side of a matrix.
        """
        kinds = [kind for group in SHARED.values() for kind in group]
        found = find_projections(backbone, kinds, self.layers)
        for kind in kinds:
            if kind not in found:
                raise ValueError(
                    f"The {kind} of {backbone.name} have different shapes, and experts need one. Use LoRA."
                )
        channels, width = found[UP][0][2].weight.shape
        if channels % self.experts:
            fitting = [number for number in range(1, 65) if channels % number == 0]
            raise ValueError(
                f"{self.experts} experts do not divide the {channels} hidden channels of {backbone.name}. Choose one of "
                f"{', '.join(map(str, fitting))}."
            )
        sites = []
        for name, group in SHARED.items():
            layers = tuple(number for number, _, _ in found[group[0]])
            count, in_features = len(layers), found[group[0]][0][2].weight.shape[1]
            smallest = min(in_features, *(found[kind][0][2].weight.shape[0] for kind in group))
            if self.rank > smallest:
                raise ValueError(
                    f"Rank {self.rank} exceeds the smaller side of {name} ({smallest}). Choose a rank of at most {smallest}."
                )
            modules = tuple(path for _, path, _ in found[group[0]])
            shape = torch.Size((count, self.rank, in_features))
            sites.append(_site(f"{name}.lora_A", shape, ("layer", "rank", "in_feature"), modules, layers))
            for kind in group:
                modules = tuple(path for _, path, _ in found[kind])
                shape = torch.Size((count, found[kind][0][2].weight.shape[0], self.rank))
                sites.append(_site(f"{kind}.lora_B", shape, ("layer", "out_feature", "rank"), modules, layers))
        if self.experts > 1:
            up = next(site for site in sites if site.name == f"{UP}.lora_A")
            shape, dims = torch.Size((len(up.layers), self.experts, width)), ("layer", "expert", "in_feature")
            router = _site(ROUTER, shape, dims, up.modules, up.layers)
            # a softmax follows, and once it has faded no forward reads it: no linear map of its own
            sites.append(replace(router, linear=False, transient=True))
        return tuple(sites)

    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Adapter.initial`: A uniform as PEFT's, B and the router zero."""
        return uniform_down(backbone, sites, generator)

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """See `Adapter.constants`: the expert of each hidden channel, ``(layers, channels)`` int64."""
        for site in sites:
            if site.name == ROUTER:
                weights = (stored_weight(backbone, path) for path in site.modules)
                found = torch.stack([balanced_clusters(weight, self.experts) for weight in weights])
                return {EXPERT: found.to(backbone.device)}
        return {}

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """See `Adapter.deltas`: ``x -> B A x``, the A of queries, keys and values once for all three."""
        named = {site.name: site for site in sites}
        changes: dict[str, Delta] = {}
        for name, group in SHARED.items():
            if (down_site := f"{name}.lora_A") not in named:
                continue
            downs = stack_entries(draw[down_site], down_site)
            ups = {kind: stack_entries(draw[f"{kind}.lora_B"], f"{kind}.lora_B") for kind in group}
            for entry, down in enumerate(downs):
                narrow = _SharedDown(down, down_site, entry, len(group)) if len(group) > 1 else None
                for kind in group:
                    up_site = f"{kind}.lora_B"
                    path, up = named[up_site].modules[entry], ups[kind][entry]
                    changes[path] = (
                        LowRankDelta(down, up, 1.0, down_site, up_site, entry)
                        if narrow is None
                        else _UpDelta(narrow, up, up_site, entry)
                    )
        return changes

    def gates(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, OutputGate]:
        """See `Adapter.gates`: the router's weights on the outputs of ``fc1``, until it has faded."""
        fade = self.fade(float(draw[PROGRESS])) if PROGRESS in draw else 1.0
        routers = [site for site in sites if site.name == ROUTER]
        if fade >= 1 or not routers:
            return {}
        weights = stack_entries(draw[ROUTER], ROUTER)
        triples = zip(routers[0].modules, weights, draw[EXPERT], strict=True)
        return {
            path: ExpertGate(weight, expert, self.temperature, fade, entry)
            for entry, (path, weight, expert) in enumerate(triples)
        }


def _site(
    name: str, shape: torch.Size, dims: tuple[str, ...], modules: tuple[str, ...], layers: tuple[int, ...]
) -> Site:
    keys = tuple(f"base_model.model.{path}.{name.rsplit('.', 1)[-1]}.weight" for path in modules)
    return Site(name, shape, dims, modules, keys, layers)


class _SharedDown:
    """``A x`` of one entry, computed once for the projections that are called with the same tensor, one after the other."""

    def __init__(self, down: Tensor, site: str, entry: int, readers: int) -> None:
        self.down, self.site, self.entry, self.readers = down, site, entry, readers
        self.kept: tuple[Tensor, bool, Tensor] | None = None
        self.waiting = 0

    def __call__(self, rows: Tensor) -> Tensor:
        # a forward that runs again during backward brings another tensor, one under no_grad another graph
        recording = torch.is_grad_enabled()
        if self.kept is None or self.kept[0] is not rows or self.kept[1] != recording:
            self.kept = (rows, recording, site_linear(rows, self.down, self.site, self.entry))
            self.waiting = self.readers
        narrow, self.waiting = self.kept[2], self.waiting - 1
        if not self.waiting:
            # whoever keeps activations for backward, it is not this
            self.kept = None
        return narrow


@dataclass(frozen=True)
class _UpDelta:
    narrow: _SharedDown
    up: Tensor
    site: str
    entry: int

    def __call__(self, rows: Tensor) -> Tensor:
        return site_linear(self.narrow(rows), self.up, self.site, self.entry).to(rows.dtype)


@dataclass(frozen=True)
class ExpertGate:
    """Multiplies each hidden channel by the weight of its expert, token by token.

    Usage::

        ExpertGate(router, expert, temperature=5.0, fade=0.3, entry=0)(rows, output)

    Args:
        router: ``W_r`` of one layer under the draw.
        expert: expert of each channel.
        temperature: divides the router's logits.
        fade: 0 for the router's own weights, 1 for equal ones.
        entry: position in the router's stack.

    Shape:
        router ``(experts, in)`` or ``(groups, experts, in)``, expert ``(channels,)``; maps rows ``(rows, tokens, in)`` and
        output ``(rows, tokens, channels)`` to the output's shape.
    """

    router: Tensor
    expert: Tensor
    temperature: float
    fade: float
    entry: int

    def weights(self, rows: Tensor) -> Tensor:
        """Weights of the experts for every token, whose mean is 1, ``(rows, tokens, experts)``."""
        shares = (site_linear(rows, self.router, ROUTER, self.entry) / self.temperature).softmax(-1)
        experts = shares.shape[-1]
        return (1 - self.fade) * experts * shares + self.fade

    def __call__(self, rows: Tensor, output: Tensor) -> Tensor:
        """The weighed output."""
        weights = self.weights(rows)
        # a product with the membership, because scattering gradients back over channels is slow and not reproducible on a GPU
        members = functional.one_hot(self.expert, weights.shape[-1]).to(weights.dtype)
        return output * (weights @ members.mT)
