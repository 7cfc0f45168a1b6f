"""Second moments of what goes into projections, streamed over any batches, padding left out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyrolora.models.atomic import replacing
from pyrolora.models.backbones import Backbone
from pyrolora.models.naming import nearest


@dataclass(frozen=True)
class SecondMoments:
    """``mean(x x')`` of each projection's input over all tokens that are not padding; not centred.

    Projections that read the same activations (q, k and v; gate and up) share one tensor.

    Attributes:
        matrices: module path -> ``(in, in)``, or ``(in,)`` where only the diagonal was collected.
        tokens: number of tokens averaged.
    """

    matrices: Mapping[str, Tensor]
    tokens: int

    def __getitem__(self, path: str) -> Tensor:
        """The moment of a projection's input.

        Raises:
            KeyError: it was not collected; the nearest path is offered.
        """
        try:
            return self.matrices[path]
        except KeyError:
            raise KeyError(
                f"No second moment of {path!r} was collected. Did you mean {nearest(path, self.matrices)!r}?"
            ) from None

    def save(self, file: str | Path) -> Path:
        """Write a safetensors file, whole or not at all; shared moments are written once."""
        file = Path(file)
        owners: dict[int, str] = {}
        shared = {path: owners.setdefault(id(matrix), path) for path, matrix in self.matrices.items()}
        tensors = {path: self.matrices[path].cpu().contiguous() for path in set(shared.values())}
        with replacing(file) as partial:
            save_file(tensors, partial, metadata={"moments": json.dumps({"shared": shared, "tokens": self.tokens})})
        return file

    @classmethod
    def load(cls, file: str | Path) -> "SecondMoments":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of moments.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"No second moments at {str(file)!r}.")
        try:
            with safe_open(file, framework="pt") as handle:
                about = json.loads(handle.metadata()["moments"])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise ValueError(f"{file} holds no second moments ({error}); write it with SecondMoments.save.") from error
        return cls({path: tensors[owner] for path, owner in about["shared"].items()}, about["tokens"])


@torch.no_grad()
def second_moments(
    backbone: Backbone,
    batches: Iterable[Mapping[str, Tensor]],
    paths: Sequence[str],
    *,
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
) -> SecondMoments:
    """Run batches through the frozen network and average ``x x'`` at the input of some projections.

    Usage::

        moments = second_moments(backbone, task_rows.batches(8), ["model.layers.0.mlp.down_proj"])

    Args:
        backbone: the frozen network; a bound draw takes part.
        batches: batches of an encoded split.
        paths: module paths.
        dtype: type in which products are formed and summed; default the sites' (float32 over half precision).
        diagonal: collect ``mean(x^2)`` alone.

    Raises:
        ValueError: no token in the batches.
    """
    collector = _Collector(dtype or backbone.site_dtype, diagonal)
    handles = [
        backbone.network.get_submodule(path).register_forward_pre_hook(collector.hook(path))
        for path in dict.fromkeys(paths)
    ]
    tokens = 0
    try:
        for batch in batches:
            collector.mask = backbone.token_mask(batch).to(backbone.device).bool()
            tokens += int(collector.mask.sum())
            backbone.hidden_states(batch)
            collector.last = None
    finally:
        for handle in handles:
            handle.remove()
    if tokens == 0:
        raise ValueError("There is no token to average over: the batches are empty. Give some calibration text.")
    # divided in place, once for each tensor however many projections share it
    for total in collector.totals.values():
        total /= tokens
    return SecondMoments({path: collector.totals[collector.owners[path]] for path in dict.fromkeys(paths)}, tokens)


class _Collector:
    """Sums over the batches; a projection that reads the tensor of the one before it adds nothing of its own."""

    mask: Tensor

    def __init__(self, dtype: torch.dtype, diagonal: bool) -> None:
        self.dtype, self.diagonal = dtype, diagonal
        self.totals: dict[str, Tensor] = {}
        self.owners: dict[str, str] = {}
        self.last: tuple[Tensor, str] | None = None

    def hook(self, path: str) -> Any:
        def before(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.last is not None and args[0] is self.last[0]:
                self.owners[path] = self.last[1]
                return
            self.last = (args[0], path)
            self.owners[path] = path
            rows = args[0][self.mask].to(self.dtype)
            product = rows.square().sum(0) if self.diagonal else rows.mT @ rows
            if path in self.totals:
                self.totals[path] += product
            else:
                self.totals[path] = product

        return before
