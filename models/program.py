"""The Pyro program: sites with priors, a frozen backbone, and labels observed in a data plate."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.nn import functional

from pyrolora.models.adapter_set import AdapterSet
from pyrolora.models.adapters.base import Adapter
from pyrolora.models.adapters.chosen import adapters_for
from pyrolora.models.backbones import PROMPT, Backbone, Delta, OutputGate
from pyrolora.models.calibration import Calibration
from pyrolora.models.constants import shared_constants
from pyrolora.models.heads import LabelHead, make_head
from pyrolora.models.likelihoods import mixed_logits, observe_labels
from pyrolora.models.prior_declarations import PriorSpecification
from pyrolora.models.priors import Prior
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.site_text import site_text
from pyrolora.models.sites import Site, SiteTable
from pyrolora.models.tasks import EncodedSplit, Split, Task, row_count

# features whose mean square length calibrates a prior in logit units, and how many of them at once
CALIBRATION_ROWS, CALIBRATION_BATCH = 256, 32

# what a batch may hold besides tensors with one row an example
ROW_KEYS = (
    "input_ids", "pixel_values", "attention_mask", "position_ids", "segment_ids", "scored", "option_mask",
    "option_lengths", "trunk",
    "support", "support_labels",
)  # fmt: skip


class BayesianModel:
    """A Pyro program over adapter weights of a frozen backbone.

    Usage::

        model = BayesianModel(load_backbone("smollm2-135m"), task("bbc_headlines"), prior=dist.Normal(0., 0.2))
        model.print_sites()
        for batch in model.encode(model.task.train).batches(16):
            TraceMeanField_ELBO().loss_and_grads(model, guide, batch)

    Calling it runs ``pyro.sample`` for every site, binds the draw, runs the network and observes the labels; any Pyro
    handler or inference algorithm applies. The draw stays bound until the next one or `release`, since gradient
    checkpointing needs it during backward.

    Args:
        backbone: the frozen network; several models may share it.
        task: prompts, labels and splits.
        adapter: one adapter or several. Where the task shows images, `LastLayer` is added if it is not among them.
        prior: a distribution, `Flat`, `learned`, a callable from site to distribution, or ``{glob pattern: one of these}``.
        num_data: rows of the data set that scale the likelihood where the program is called directly; default the task's
            training split. Engines count the data that they are given.
        max_length: longest prompt in tokens.
        constants: the adapters' constants, if they were made before; see `Adapter.constants`.

    Raises:
        TypeError: an adapter or prior that is none.
        ValueError: an adapter, prior or task that does not fit; see `Adapter.sites`, `Prior` and `tasks.encode`.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        adapter: Adapter | Sequence[Adapter] | None = None,
        prior: PriorSpecification | None = None,
        *,
        num_data: int | None = None,
        max_length: int = 300,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.adapters = adapters_for(task, adapter)
        self.max_length = max_length
        self._mean_square: float | None = None
        self.num_data = len(task.train) if num_data is None else num_data
        if task.format.kind not in backbone.formats:
            raise ValueError(
                f"The task {task.name!r} shows {'images' if 'image' in task.format.fields else 'text'}, which "
                f"{backbone.name!r} does not read. Use a vision transformer for images, and a language model for text."
            )
        label_ids = None if task.format.kind == "option" else task.format.label_ids(backbone.tokenizer)
        self.head = make_head(backbone, task.format, label_ids, all(one.keeps_label_rows for one in self.adapters))
        self.label_ids: tuple[int, ...] = () if label_ids is None else tuple(label_ids)
        self.classes = None if label_ids is None else len(label_ids)
        self._adapter_set = AdapterSet(self.adapters, [self._sites_of(adapter) for adapter in self.adapters])
        self.context_keys, self.adapter_sites = self._adapter_set.context_keys, self._adapter_set.table
        self.constants = self._make_constants() if constants is None else self._placed(constants)
        self.prior = Prior(
            dist.Normal(0.0, 0.2) if prior is None else prior,
            self.adapter_sites,
            backbone.device,
            backbone.site_dtype,
            self.relative_scales,
        )
        self.sites = self._discover()
        blocks = [layer for site in self.adapter_sites.values() for layer in site.layers]
        # an episode's labelled images pass through the adapted blocks as well, and no trunk of the queries is theirs
        episodic = isinstance(self.head, PrototypeHead)
        self.first_block = 0 if episodic else min(blocks, default=len(backbone.blocks))

    def _sites_of(self, adapter: Adapter) -> tuple[Site, ...]:
        sites = adapter.sites(self.backbone, self.classes)
        # a weight acts on a query through its prototypes too, so a row's gradient is not that of its own activations; a row
        # with a latent summed out goes through the network several times, so no map sees one activation a token
        several = isinstance(self.head, PrototypeHead) or any(one.enumerates for one in self.adapters)
        return tuple(replace(site, linear=False) for site in sites) if several else sites

    def _make_constants(self) -> dict[str, Tensor]:
        def batches(samples: int, seed: int) -> Iterator[Mapping[str, Tensor]]:
            train = self.task.train
            return self.encode(train if len(train) <= samples else train.subset(samples, seed=seed)).batches(8)

        def loss(batch: Mapping[str, Tensor]) -> Tensor:
            logits = self.head(batch, (), None, 0)
            return functional.cross_entropy(logits, batch["labels"].to(logits.device))

        calibration = Calibration(batches, loss, self.label_ids, self.task.tables)
        return shared_constants(self.backbone, self._adapter_set, calibration, self.task, self.max_length)

    def _placed(self, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.backbone.device, self.backbone.site_dtype
        placed = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in constants.items()
        }
        start = self.initial(torch.Generator().manual_seed(0))
        self._adapter_set.require_constants({**placed, **start}, placed)
        return placed

    def with_constants(self, constants: Mapping[str, Tensor]) -> "BayesianModel":
        """This model around other constants, such as those of a saved posterior; itself where they are equal."""
        placed = self._placed(constants)
        if placed.keys() == self.constants.keys() and all(
            torch.equal(value, self.constants[name]) for name, value in placed.items()
        ):
            return self
        return BayesianModel(
            self.backbone, self.task, self.adapters, self.prior.specification, num_data=self.num_data,
            max_length=self.max_length, constants=placed,
        )  # fmt: skip

    def settled(self) -> "BayesianModel":
        """This model with learned prior scales of its own, which later fits of this one leave alone; itself without any."""
        if not self.prior.scales:
            return self
        other = copy.copy(self)
        other.prior = self.prior.snapshot()
        return other

    def relative_scales(self, ratio: float) -> dict[str, Tensor]:
        """Standard deviations under which every adapter changes its weights by a ratio; see `Adapter.relative_scales`."""
        return self._adapter_set.relative_scales(self.backbone, self.constants, ratio)

    def centres(self) -> dict[str, Tensor]:
        """What makes the factors themselves of sites that are changes of them; see `Adapter.centres`."""
        return self._adapter_set.centres(self.constants)

    def _discover(self) -> SiteTable:
        """All latent sites in program order: adapter sites and whatever a callable prior samples."""
        start = self.initial(torch.Generator().manual_seed(0))
        # only shapes are wanted of what a callable prior samples here, so the user's random state stays as it was
        with (
            torch.random.fork_rng(devices=[]),
            poutine.trace() as traced,
            poutine.condition(data=start),
            torch.no_grad(),
        ):
            self.sample_sites()
        table = []
        nodes: Any = traced.trace.nodes
        for name, node in nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            if name in self.adapter_sites:
                table.append(self.adapter_sites[name])
            else:
                shape = node["value"].shape
                if node["fn"].batch_shape:
                    raise ValueError(
                        f"A prior samples {name!r} with the batch shape {tuple(node['fn'].batch_shape)}; a site must be one "
                        f"event. Leave the plate out and write .expand({list(shape)}).to_event({len(shape)})."
                    )
                dims = tuple(f"{name}_dim_{i}" for i in range(len(shape)))
                support = node["fn"].support
                if getattr(support, "base_constraint", None) is dist.constraints.real:
                    support = dist.constraints.real
                table.append(Site(name, shape, dims, support=support, hyper=True))
        return SiteTable(table)

    def initial(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A start for every adapter site at which the network is the pretrained one."""
        return self._adapter_set.initial(self.backbone, generator)

    def sample_sites(self) -> dict[str, Tensor]:
        """Run the prior part of the program alone: one ``pyro.sample`` for each site.

        Returns:
            Adapter site name -> value; a handler such as noise scopes may add a leading dimension of draws.
        """
        drawn: dict[str, Tensor] = {}
        for name, site in self.adapter_sites.items():
            drawn[name] = pyro.sample(name, self.prior(site, drawn))
        return drawn

    def __call__(self, batch: Mapping[str, Tensor], num_data: int | None = None) -> Tensor:
        """The Pyro program.

        Args:
            batch: a batch of `encode`'s split; without ``labels`` they are sampled.
            num_data: rows of the whole data set, if not the model's own.

        Returns:
            The labels, observed or sampled.

        Shape:
            ``(rows,)``
        """
        logits = self.row_logits(batch, self.sample_sites(), local=True)
        labels = batch.get("labels")
        labels = None if labels is None else labels.to(logits.device)
        index = batch.get("index")
        rows = self.num_data if num_data is None else num_data
        return observe_labels(logits, labels, None if index is None else index.to(logits.device), rows)

    def diagnostics(self, draw: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """What the adapters record of a draw at every training step; empty for most."""
        return self._adapter_set.diagnostics({**self._context(batch), **draw} if self.context_keys else draw)

    def deltas(self, draw: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None) -> dict[str, Delta]:
        """What a draw adds to the output of each adapted projection; see `Adapter.deltas`.

        Args:
            draw: site name -> value.
            batch: what gates read, such as the batch of the forward that follows; None where no adapter has one.
        """
        return self._adapter_set.deltas({**self.constants, **self._context(batch), **draw})

    def gates(self, draw: Mapping[str, Tensor], batch: Mapping[str, Tensor] | None = None) -> dict[str, OutputGate]:
        """What a draw makes of the changed outputs of projections; see `Adapter.gates`.

        Args:
            draw: site name -> value.
            batch: see `deltas`.

        Raises:
            ValueError: two adapters gate one projection.
        """
        return self._adapter_set.gates({**self.constants, **self._context(batch), **draw})

    def _context(self, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if batch is None or not self.context_keys:
            return {}
        device, dtype = self.backbone.device, self.backbone.site_dtype
        found = {key: batch[key] for key in self.context_keys if key in batch}
        if PROMPT in self.context_keys and PROMPT not in found and "input_ids" in batch:
            found[PROMPT] = self.backbone.prompt_embedding(batch)
        return {
            key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in found.items()
        }

    def row_logits(self, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor], *, local: bool = False) -> Tensor:
        """Class logits of each row; a draw with a leading dimension of ``groups`` serves ``groups`` equal runs of rows.

        Args:
            batch: a batch of `encode`'s split.
            draw: site name -> value.
            local: draw what adapters draw for single rows (`Adapter.local_draw`); without it they use their own mean.

        Shape:
            ``(rows, classes)``
        """
        values = {**self.constants, **self._context(batch), **draw}
        if local:
            values = self._adapter_set.with_local_draws(values)
        self._adapter_set.bind(self.backbone, values)
        mixing = self._adapter_set.enumerated(values)
        if mixing is not None:
            each = mixing.shape[-1]
            batch = {k: value.repeat_interleave(each, dim=0) if value.dim() else value for k, value in batch.items()}
        logits = self.bound_logits(batch, draw)
        return logits if mixing is None else mixed_logits(logits, mixing)

    def bound_logits(self, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Tensor:
        """Class logits of each row under whatever is bound, with the label rows of a draw.

        Shape:
            ``(rows, classes)``
        """
        trunk = batch.get("trunk")
        return self.head(batch, self._label_changes(draw), trunk, self.first_block if trunk is not None else 0)

    @property
    def draws_locally(self) -> bool:
        """Whether an adapter draws something for every row anew, beside the sites."""
        return self._adapter_set.draws_locally

    @property
    def enumerates(self) -> bool:
        """Whether an adapter sums a latent out, so that every row has several networks and no one feature vector."""
        return self._adapter_set.enumerates

    def features(self, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> Tensor:
        """What the label rows are multiplied with, under a draw of the sites inside the network.

        Args:
            batch: as `row_logits` takes it.
            draw: site name -> value; sites of the last layer play no part and may be missing.

        Shape:
            ``(rows, hidden)``, in the sites' float type
        """
        self.bind(batch, draw)
        trunk = batch.get("trunk")
        first_block = self.first_block if trunk is not None else 0
        return self.backbone.features(batch, trunk=trunk, first_block=first_block).to(self.backbone.site_dtype)

    def feature_logits(self, features: Tensor, draw: Mapping[str, Tensor]) -> Tensor:
        """Class logits from `features`, under a draw of the sites of the last layer.

        Shape:
            ``(rows, classes)``

        Raises:
            ValueError: the task scores options and has no label rows.
        """
        if not isinstance(self.head, LabelHead):
            raise ValueError(
                f"The task {self.task.name!r} scores options or compares with prototypes, so its logits are no function of "
                "one feature vector. Use a task with label words, letters or classes of images."
            )
        return self.head.from_features(features, self._label_changes(draw))

    @property
    def label_adapters(self) -> tuple[Adapter, ...]:
        """The adapters that change the class logits themselves, not only what lies below them."""
        zero = torch.zeros((), device=self.backbone.device, dtype=self.backbone.site_dtype)
        values = {name: zero.expand(site.shape) for name, site in self.adapter_sites.items()}
        return tuple(adapter for adapter, _ in self._adapter_set.label_changes({**self.constants, **values}))

    def _label_changes(self, draw: Mapping[str, Tensor]) -> list[Delta]:
        return [change for _, change in self._adapter_set.label_changes({**self.constants, **draw})]

    def logits(self, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor], *, local: bool = False) -> Tensor:
        """Class logits of every row under every draw, all draws on the batch axis, the trunk run once.

        Args:
            batch: a batch of `encode`'s split.
            draw: site name -> ``(draws, *site.shape)``, or the site's shape for a single draw.
            local: see `row_logits`.

        Shape:
            ``(draws, rows, classes)``

        Raises:
            ValueError: sites disagree on the number of draws.
        """
        draws = self._count_draws(draw)
        if "trunk" not in batch and self.first_block > 0:
            batch = {**batch, "trunk": self.backbone.trunk(batch, self.first_block)}
        rows = row_count(batch)
        if self.first_block == len(self.backbone.blocks) and isinstance(self.head, LabelHead):
            # no draw reaches the network, so one pass serves them all
            features = self.features(batch, draw).repeat(draws, 1)
            return self.feature_logits(features, draw).unflatten(0, (draws, rows))
        return self.row_logits(self.repeated(batch, draws), draw, local=local).unflatten(0, (draws, rows))

    def repeated(self, batch: Mapping[str, Tensor], draws: int) -> dict[str, Tensor]:
        """A batch with its rows once for each draw, all that the network and the adapters' gates read of it.

        A context of no dimension, such as how far training is, is one for all rows.
        """
        # what gates read is made once, not once a draw
        kept = {key: batch[key] for key in ROW_KEYS if key in batch} | self._context(batch)
        return {
            key: value.repeat(draws, *[1] * (value.dim() - 1)) if value.dim() else value for key, value in kept.items()
        }

    def _count_draws(self, draw: Mapping[str, Tensor]) -> int:
        counts = {
            draw[name].shape[0] for name, site in self.adapter_sites.items() if draw[name].dim() > len(site.shape)
        }
        if len(counts) > 1:
            raise ValueError(f"Sites hold different numbers of draws: {sorted(counts)}. Draw them together.")
        return counts.pop() if counts else 1

    def bind(self, batch: Mapping[str, Tensor], draw: Mapping[str, Tensor]) -> None:
        """Put a draw into the backbone for forwards of this batch, such as generation, until `release`.

        Raises:
            ValueError: an adapter sums a latent out, so that no one network stands for a row.
        """
        values = {**self.constants, **self._context(batch), **draw}
        if self._adapter_set.enumerated(values) is not None:
            raise ValueError(
                "Each row has a network for every expert of gate='categorical', which are mixed by class probabilities: it "
                "has no features and writes no answer. Use another gate for that."
            )
        self._adapter_set.bind(self.backbone, values)

    def release(self) -> None:
        """Forget the bound draw and the graph it holds."""
        self.backbone.release()

    @torch.no_grad()
    def calibrate_prior(self, data: EncodedSplit) -> None:
        """Turn prior scales declared in units of a logit into scales of weights; nothing happens without such priors.

        Uses the pretrained network's features of at most `CALIBRATION_ROWS` examples, found once.
        """
        names = self.prior.in_logit_units
        if not names:
            return
        if self._mean_square is None:
            start, total, rows = self.initial(torch.Generator().manual_seed(0)), 0.0, 0
            chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:CALIBRATION_ROWS].tolist()
            for first in range(0, len(chosen), CALIBRATION_BATCH):
                features = self.features(data.batch(chosen[first : first + CALIBRATION_BATCH]), start)
                total, rows = total + float(features.square().sum()), rows + len(features)
            self.release()
            self._mean_square = total / rows
        self.prior.calibrate(self._mean_square)

    def place_scales(self, data: EncodedSplit, estimate: "BayesianModel | None" = None) -> None:
        """Put learned prior scales where a fit begins: ``model.place_scales(encoded, estimate=posterior.model)``.

        Args:
            data: what scales in units of a logit are converted with.
            estimate: a model whose scales are taken if its prior is declared alike; else they start as declared.
        """
        if estimate is None or not self.prior.adopt(estimate.prior):
            self.prior.reset_scales()
            self.calibrate_prior(data)

    def encode(self, data: Split | EncodedSplit) -> EncodedSplit:
        """Tokenise a split with this model's prompt; an encoded split passes through.

        A split of another task is asked with *this* task's prompt, which is how out-of-distribution data is scored.

        Raises:
            ValueError: a split that was encoded for another way of asking.
        """
        if isinstance(data, EncodedSplit):
            if data.kind != self.task.format.kind or tuple(data.label_ids) != self.label_ids:
                raise ValueError(
                    f"{data.name} was encoded for other classes or another format than those of the task "
                    f"{self.task.name!r}. Pass the split itself, and the model encodes it."
                )
            return data
        return self.backbone.encode(data, self.task.format, self.max_length)

    def site_table(self) -> str:
        """The sites as text: name, shape, dims, prior, number of weights."""
        return site_text(self.sites, self.prior.to_dict())

    def print_sites(self) -> None:
        """Print `site_table`, the twin of PEFT's ``print_trainable_parameters``."""
        print(self.site_table())  # noqa: T201
