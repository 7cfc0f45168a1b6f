"""Curvature summed over a data set: streaming, resumable, the same for every batch size."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.digests import data_digest, tensor_digest
from pyrolora.inference.laplace.structures import BatchMoments, Dense, Diagonal, Eigenbases, Kronecker, Structure
from pyrolora.inference.logit_gradients import LogitGradients, hessian_root
from pyrolora.models.atomic import replacing
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit
from pyrolora.models.trunk import TrunkCache

logger = logging.getLogger(__name__)

FILE = "curvature.safetensors"
# batches between two checkpoints
CHECKPOINT_EVERY = 20


def new_structures(model: BayesianModel, names: Sequence[str], structure: str, rank: int) -> dict[str, Structure]:
    """An empty structure for each site.

    Args:
        model: the model.
        names: the sites.
        structure: ``"diag"``, ``"kron"``, ``"kron_lowrank"``, ``"full"`` or ``"last_layer"``.
        rank: eigenvectors of a side that ``"kron_lowrank"`` keeps.
    """
    where = model.backbone.site_dtype, model.backbone.device
    made: dict[str, Structure] = {}
    for name in names:
        site = model.sites[name]
        if structure == "diag":
            made[name] = Diagonal(site, *where)
        elif structure in ("kron", "kron_lowrank"):
            made[name] = Kronecker(site, *where, rank=rank if structure == "kron_lowrank" else None)
        else:
            made[name] = Dense(site, *where)
    return made


def sum_curvature(
    gradients: LogitGradients,
    structures: Mapping[str, Structure],
    data: EncodedSplit,
    *,
    batch_size: int,
    checkpoint: str | Path | None,
    progress: bool,
) -> float:
    """Add the generalised Gauss-Newton matrix of every example to the structures, then decompose them.

    Args:
        gradients: where to linearise.
        structures: empty structures, one for each site; changed in place.
        data: the data set.
        batch_size: examples at once.
        checkpoint: folder to keep unfinished sums in, or None; an interrupted pass goes on from there.
        progress: show a bar.

    Returns:
        Log likelihood of the data at the estimate, nats, from the logits that the curvature needs anyway.

    Raises:
        ValueError: the unfinished sums in the folder are of another pass, or damaged.
    """
    path = None if checkpoint is None else Path(checkpoint) / FILE
    about: dict[str, Any] = {"done": 0, "log_likelihood": 0.0}
    if path is not None:
        about["identity"] = _identity(gradients, structures, data, batch_size)
        _restore(path, structures, about)
    trunks = TrunkCache(gradients.model.backbone, gradients.model.first_block, len(data))
    total = data.steps_per_epoch(batch_size)
    bar = tqdm(total=total, initial=about["done"], desc="curvature", disable=not progress, leave=False)
    with bar:
        for index, batch in enumerate(data.batches(batch_size)):
            if index < about["done"]:
                continue
            moments = BatchMoments()
            logits, columns = gradients.columns(trunks.attach(batch), hessian_root)
            chosen = logits.double().log_softmax(-1).gather(-1, batch["labels"].to(logits.device)[:, None])
            for column, products in enumerate(columns):
                for name, structure in structures.items():
                    if column == 0:
                        structure.add_inputs(products[name], moments)
                    structure.add(products[name])
            bar.update()
            about["done"], about["log_likelihood"] = index + 1, about["log_likelihood"] + float(chosen.sum())
            if path is not None and about["done"] % CHECKPOINT_EVERY == 0:
                _write(path, structures, about)
    eigenbases = Eigenbases()
    for structure in structures.values():
        structure.decompose(eigenbases)
    if path is not None:
        path.unlink(missing_ok=True)
    return float(about["log_likelihood"])


def _identity(
    gradients: LogitGradients, structures: Mapping[str, Structure], data: EncodedSplit, batch_size: int
) -> str:
    """A hash of all that the unfinished sums depend on."""
    model = gradients.model
    settings = {
        "backbone": model.backbone.fingerprint,
        "dtype": str(model.backbone.dtype),
        "adapters": [adapter.to_dict() for adapter in model.adapters],
        "values": tensor_digest({**model.constants, **gradients.estimate}),
        "structures": {name: structure.name for name, structure in structures.items()},
        "data": data_digest(data),
        "batch_size": batch_size,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _write(path: Path, structures: Mapping[str, Structure], about: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {
        f"{name}/{key}": value.cpu().contiguous()
        for name, structure in structures.items()
        for key, value in structure.state().items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})


def _restore(path: Path, structures: Mapping[str, Structure], about: dict[str, Any]) -> None:
    """Take over unfinished sums, and how far they went, if there are any."""
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            kept = json.loads(file.metadata()["about"])
            if kept["identity"] != about["identity"]:
                raise ValueError(
                    f"The unfinished curvature in {path.parent} is of another estimate, data set or structure. Use another "
                    "folder, or delete it to start over."
                )
            for name, structure in structures.items():
                for key, value in structure.state().items():
                    value.copy_(file.get_tensor(f"{name}/{key}").to(value))
            about.update(done=int(kept["done"]), log_likelihood=float(kept["log_likelihood"]))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"The unfinished curvature {path} is damaged ({error}). Delete it to start over.") from error
    logger.info("Resuming the curvature at batch %d from %s", about["done"], path.parent)


def flat_eigenvalues(structures: Mapping[str, Structure]) -> dict[str, Tensor]:
    """Eigenvalues of every site, ``(entries, directions)``."""
    with torch.no_grad():
        return {name: structure.eigenvalues() for name, structure in structures.items()}
