"""State of an unfinished fit on disk: safetensors and JSON, written whole or not at all."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyrolora.inference.engine import StepStats
from pyrolora.models.atomic import replacing

if TYPE_CHECKING:
    from pyrolora.inference.training import TrainingRun

FILE = "training_state.safetensors"


def exists(folder: str | Path) -> bool:
    """Whether a folder holds the state of a fit."""
    return (Path(folder) / FILE).is_file()


def write(run: "TrainingRun", folder: str | Path) -> None:
    """Keep guide, optimiser, learned prior scales, step and history in one file, replaced in one move.

    Args:
        run: the fit.
        folder: where to keep it; made if missing.
    """
    tensors: dict[str, Tensor] = {f"guide.{key}": value for key, value in run.guide.state_dict().items()}
    tensors.update(run.optimiser.state_tensors())
    if run.widths is not None:
        tensors.update(run.widths.state_tensors())
    tensors.update({f"average.{index}": value for index, value in enumerate(run.averages)})
    tensors.update({f"prior.{name}": scale for name, scale in run.model.prior.scales.items()})
    if run.bank is not None:
        tensors.update(run.bank.state_tensors())
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    about = {
        "step": run.step,
        "history": [stats.to_dict() for stats in run.history],
        "identity": run.identity(),
    }
    with replacing(Path(folder) / FILE) as partial:
        # one file holds tensors and JSON, so that the two can never be of different steps
        save_file(tensors, partial, metadata={"run": json.dumps(about)})


def restore(run: "TrainingRun", folder: str | Path) -> None:
    """Put a fit back where `write` left it.

    Args:
        run: a fit of the same settings, model and data, not yet begun.
        folder: where the state is.

    Raises:
        ValueError: the state is of another fit (the first difference is named), or the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise ValueError(f"The training state {path} is damaged ({error}). Delete it to start over.") from error
    difference = _first_difference(about["identity"], json.loads(json.dumps(run.identity())))
    if difference is not None:
        key, stored, wanted = difference
        raise ValueError(
            f"The training state in {folder} belongs to another fit: {key} was {stored!r} and is now {wanted!r}. "
            "Use the same settings to go on, or another checkpoint folder to start over."
        )
    guide = {key.removeprefix("guide."): value for key, value in tensors.items() if key.startswith("guide.")}
    run.guide.load_state_dict(guide)
    run.optimiser.load_state(tensors, about["step"])
    if run.widths is not None:
        run.widths.load_state(tensors)
    for index, parameter in enumerate(run.parameters):
        if (average := tensors.get(f"average.{index}")) is not None:
            run.averages.append(average.to(parameter.device))
    run.model.prior.restore({name: tensors[f"prior.{name}"] for name in run.model.prior.scales})
    if run.bank is not None:
        run.bank.load_state(tensors)
    run.step = about["step"]
    run.history = [StepStats(**stats) for stats in about["history"]]


def _first_difference(stored: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for name in sorted(stored.keys() | wanted.keys()):
            found = _first_difference(stored.get(name), wanted.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if stored == wanted else (key, stored, wanted)
