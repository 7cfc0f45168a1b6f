"""Curvature summed over a data set: streaming, resumable, the same for every batch size."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.laplace.structures import Dense, Diagonal, Eigenbases, Kronecker, SecondMoments, Structure
from pyrolora.inference.logit_gradients import LogitGradients, hessian_root
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
) -> None:
    """Add the generalised Gauss-Newton matrix of every example to the structures, then decompose them.

    Args:
        gradients: where to linearise.
        structures: empty structures, one for each site; changed in place.
        data: the data set.
        batch_size: examples at once.
        checkpoint: folder to keep unfinished sums in, or None; an interrupted pass goes on from there.
        progress: show a bar.

    Raises:
        ValueError: the unfinished sums in the folder are of another pass, or damaged.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    identity = _identity(gradients, structures, data, batch_size)
    done = 0 if folder is None else _restore(folder, structures, identity)
    trunks = TrunkCache(gradients.model.backbone, gradients.model.first_block, len(data))
    total = data.steps_per_epoch(batch_size)
    bar = tqdm(total=total, initial=done, desc="curvature", disable=not progress, leave=False)
    with bar:
        for index, batch in enumerate(data.batches(batch_size)):
            if index < done:
                continue
            second_moments = SecondMoments()
            _, columns = gradients.columns(trunks.attach(batch), hessian_root)
            for column, products in enumerate(columns):
                for name, structure in structures.items():
                    if column == 0:
                        structure.add_inputs(products[name], second_moments)
                    structure.add(products[name])
            bar.update()
            if folder is not None and (index + 1) % CHECKPOINT_EVERY == 0:
                _write(folder, structures, identity, index + 1)
    eigenbases = Eigenbases()
    for structure in structures.values():
        structure.decompose(eigenbases)
    if folder is not None:
        (folder / FILE).unlink(missing_ok=True)


def _identity(
    gradients: LogitGradients, structures: Mapping[str, Structure], data: EncodedSplit, batch_size: int
) -> str:
    digest = hashlib.sha256(gradients.model.backbone.fingerprint.encode())
    for name, structure in structures.items():
        digest.update(f"{name}:{structure.name}".encode())
    for name, value in sorted(gradients.estimate.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    digest.update(repr((batch_size, data.label_ids, data.labels.tolist(), [len(row) for row in data.rows])).encode())
    return digest.hexdigest()[:16]


def _write(folder: Path, structures: Mapping[str, Structure], identity: str, done: int) -> None:
    tensors: dict[str, Tensor] = {
        f"{name}/{key}": value.cpu().contiguous()
        for name, structure in structures.items()
        for key, value in structure.state().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    save_file(tensors, partial, metadata={"about": json.dumps({"identity": identity, "done": done})})
    partial.replace(folder / FILE)


def _restore(folder: Path, structures: Mapping[str, Structure], identity: str) -> int:
    path = folder / FILE
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if about["identity"] != identity:
                raise ValueError(
                    f"The unfinished curvature in {folder} is of another estimate, data set or structure. Use another "
                    "folder, or delete it to start over."
                )
            for name, structure in structures.items():
                for key, value in structure.state().items():
                    value.copy_(file.get_tensor(f"{name}/{key}").to(value))
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"The unfinished curvature {path} is damaged ({error}). Delete it to start over.") from error
    logger.info("Resuming the curvature at batch %d from %s", about["done"], folder)
    return int(about["done"])


def flat_eigenvalues(structures: Mapping[str, Structure]) -> dict[str, Tensor]:
    """Eigenvalues of every site, ``(entries, directions)``."""
    with torch.no_grad():
        return {name: structure.eigenvalues() for name, structure in structures.items()}
