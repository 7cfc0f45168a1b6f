"""What every adapter answers: its sites, where they start, and how a draw changes the network."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.models.answer_position import every_position
from pyrolora.models.backbones import Backbone, Delta, OutputGate
from pyrolora.models.local import LocalWeight
from pyrolora.models.naming import nearest
from pyrolora.models.settings import check_numbers
from pyrolora.models.sites import Site

if TYPE_CHECKING:
    from pyrolora.models.calibration import Calibration

# entry of a training batch: the share of training that is done, a number from 0 to 1 for all rows
PROGRESS = "progress"


@dataclass(frozen=True)
class Adapter(ABC):
    """Declares sites, and says how a draw of them changes a frozen network.

    A subclass is a frozen dataclass of hyper-parameters; it holds no tensor, so one instance serves any number of
    networks and models.
    """

    registered: ClassVar[dict[str, type["Adapter"]]] = {}
    # whether `deltas` map every position by itself, so that the last block may run at the answer alone
    by_position: ClassVar[bool] = False
    # whether `constants` look at the task's examples; those that do not are made once for a backbone
    reads_examples: ClassVar[bool] = True

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # a promise about its own deltas, which a subclass does not inherit with other ones
        cls.by_position = vars(cls).get("by_position", False)
        if not abstract:
            Adapter.registered[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Make tuples of lists and other collections, so that an adapter is equal and hashable; refuse bad numbers."""
        check_numbers(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                object.__setattr__(self, entry.name, tuple(value))

    @abstractmethod
    def sites(self, backbone: Backbone, classes: int | None) -> tuple[Site, ...]:
        """The sites this adapter adds to a network.

        Args:
            backbone: the frozen network.
            classes: number of label classes, or None where options are scored instead.

        Raises:
            ValueError: the network lacks a target, or a hyper-parameter does not fit its matrices.
        """

    @abstractmethod
    def initial(
        self, backbone: Backbone, sites: Sequence[Site], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """A start for every site, float32, at which the network computes what it computed before.

        Args:
            backbone: the frozen network; it is read, never changed.
            sites: what `sites` returned.
            generator: source of the random part.
        """

    def constants(
        self, backbone: Backbone, sites: Sequence[Site], calibration: "Calibration | None" = None
    ) -> dict[str, Tensor]:
        """Tensors that belong to the adapter and are not sampled: where factors start, which channels were chosen.

        Made once for a model, saved with its posteriors, never made again on loading.

        Args:
            backbone: the frozen network.
            sites: what `sites` returned.
            calibration: examples of the model's own task, for adapters that look at data.
        """
        return {}

    def centres(self, sites: Sequence[Site], constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is added to a site's value to make the factor itself, for sites that are changes; nothing for most.

        Args:
            sites: what `sites` returned.
            constants: what `constants` returned.

        Returns:
            Site name -> tensor of the site's shape.
        """
        return {}

    def relative_scales(
        self, backbone: Backbone, sites: Sequence[Site], constants: Mapping[str, Tensor], ratio: float
    ) -> dict[str, Tensor]:
        """Standard deviations under which a projection's change is ``ratio`` times its weight, root mean square.

        Args:
            backbone: the frozen network.
            sites: what `sites` returned.
            constants: what `constants` returned.
            ratio: ``sqrt(E |change|^2 / |weight|^2)``, to first order in the change.

        Returns:
            Site name -> tensor that broadcasts to the site's shape.

        Raises:
            ValueError: the adapter knows no such scale.
        """
        raise ValueError(f"{type(self).__name__} has no scale of its own; give a prior such as Normal(0, 0.1) instead.")

    def to_peft(
        self, backbone: Backbone, sites: Sequence[Site], draw: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """One draw in PEFT's file format: its configuration and its weights; None where PEFT cannot hold it.

        Args:
            backbone: the frozen network.
            sites: what `sites` returned.
            draw: site name -> value of the site's shape.
            constants: what `constants` returned.
        """
        return None

    def deltas(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, Delta]:
        """For each adapted projection, a function of its input that returns the change of its output.

        Args:
            sites: what `sites` returned.
            draw: the model's constants by name, and site name -> value of the site's shape, or with one leading dimension
                of ``groups`` draws; the rows of a batch are then ``groups`` equal runs, one for each draw. Where the changes
                are for a batch, also its entries called `context_keys`, repeated with the draws.
        """
        return {}

    def gates(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, OutputGate]:
        """For each gated projection, a function of its input and of its output after all changes; see `Backbone.bind`.

        Args:
            sites: what `sites` returned.
            draw: see `deltas`.
        """
        return {}

    @property
    def context_keys(self) -> tuple[str, ...]:
        """Entries of a batch that `deltas` and `gates` read beside the draw, such as what a gate is made from."""
        return ()

    def local_draw(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an adapter draws for every row anew, from its own conditional given sites and batch; nothing for most.

        Args:
            values: what `deltas` takes; the result is added to it.
        """
        return {}

    @property
    def draws_locally(self) -> bool:
        """Whether `local_draw` draws anything."""
        return False

    @property
    def enumerates(self) -> bool:
        """Whether `enumerated` gives probabilities, so that every row has several networks."""
        return False

    def enumerated(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Log probabilities of a discrete latent of each row that is to be summed out; None for most.

        The network then runs once for each value, every row ``values`` times in a run, and class probabilities are mixed.

        Args:
            values: what `deltas` takes.

        Shape:
            ``(rows, values)``
        """
        return None

    def label_change(self, draw: Mapping[str, Tensor]) -> Delta | None:
        """A function of the features that returns the change of the class logits, or None.

        Shape:
            the function maps ``(rows, 1, hidden)`` to ``(rows, 1, classes)``
        """
        return None

    @property
    def keeps_label_rows(self) -> bool:
        """Whether the network's own label rows play a part in the class logits."""
        return True

    def diagnostics(self, sites: Sequence[Site], draw: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of a draw that training records at every step, such as how far factors are from orthonormal.

        Args:
            sites: what `sites` returned.
            draw: see `deltas`; with the entries of the step's batch that are called `context_keys`.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Hyper-parameters and the adapter's name under ``"adapter"``, ready for JSON."""
        return {"adapter": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> "Adapter":
        """Rebuild an adapter from `to_dict`.

        Raises:
            ValueError: an unknown adapter or hyper-parameter; the nearest valid name is offered.
        """
        settings = dict(settings)
        name = settings.pop("adapter", None)
        if name not in Adapter.registered:
            raise ValueError(
                f"Unknown adapter {name!r}. Did you mean {nearest(str(name), Adapter.registered)!r}? "
                f"Adapters: {', '.join(sorted(Adapter.registered))}."
            )
        kind = Adapter.registered[name]
        valid = [field.name for field in fields(kind)]
        for key in settings:
            if key not in valid:
                raise ValueError(
                    f"{name} has no setting {key!r}. Did you mean {nearest(key, valid)!r}? Settings: {', '.join(valid)}."
                )
        return kind(**settings)


class LinearTape:
    """What went into and came out of every product of activations with a site's weights, in one forward pass.

    All that curvature needs of a site whose entries are weights of linear maps: a gradient of a weight is the gradient of
    the output times the input, so nothing of the weights' own size is ever kept for an example.

    Attributes:
        products: site name -> entry of the stack -> (input, output), ``(rows, tokens, in)`` and ``(rows, tokens, out)``;
            the input in the type in which it came, and one tensor where several maps read the same activations.
    """

    def __init__(self) -> None:
        self.products: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, rows: Tensor, output: Tensor, site: str, entry: int) -> None:
        """Keep one product."""
        # the key stays valid because the tensor itself is kept beside what is handed out
        _, kept = self._inputs.setdefault(id(rows), (rows, rows.detach()))
        self.products.setdefault(site, {})[entry] = (kept, output)

    def __enter__(self) -> "LinearTape":
        """Record until the block ends."""
        self._token = _TAPE.set(self)
        self._every = every_position()
        self._every.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        """Stop recording."""
        self._every.__exit__(*details)
        _TAPE.reset(self._token)


_TAPE: ContextVar[LinearTape | None] = ContextVar("linear_tape", default=None)


def site_linear(rows: Tensor, weight: Tensor | LocalWeight, site: str, entry: int = 0) -> Tensor:
    """`grouped_linear` with the weights of one entry of a site, seen by a `LinearTape` if one records.

    Args:
        rows: activations, cast to the type of the weights.
        weight: the entry's weights under the draw, or noise for each token in their place.
        site: name of the site.
        entry: position in the site's stack.

    Shape:
        see `grouped_linear`
    """
    cast = rows.to(weight.dtype)
    output = weight.product(cast) if isinstance(weight, LocalWeight) else grouped_linear(cast, weight)
    tape = _TAPE.get()
    if tape is not None:
        tape.record(rows, output, site, entry)
    return output


def grouped_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` where each of ``groups`` equal runs of rows may have a weight of its own.

    Args:
        rows: activations.
        weight: one matrix, or one for each group of rows.

    Shape:
        rows ``(rows, tokens, in)``, weight ``(out, in)`` or ``(groups, out, in)``; returns ``(rows, tokens, out)``.

    Raises:
        ValueError: the rows do not divide into the groups.
    """
    if weight.dim() == 2:
        return functional.linear(rows, weight)
    groups = weight.shape[0]
    if rows.shape[0] % groups:
        raise ValueError(f"{rows.shape[0]} rows do not divide into {groups} draws; give each draw equally many rows.")
    flat = rows.reshape(groups, -1, rows.shape[-1])
    return torch.bmm(flat, weight.mT).reshape(*rows.shape[:-1], weight.shape[-2])
