"""Posteriors on disk: a PEFT adapter of the mean, the full guide in safetensors, settings in JSON."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrolora.guides.base import Family
from pyrolora.guides.build import build_guide, resolve
from pyrolora.models.adapters import Adapter
from pyrolora.models.atomic import replacing_folder
from pyrolora.models.backbones import Backbone
from pyrolora.models.loading import load_backbone
from pyrolora.models.naming import nearest
from pyrolora.models.priors import Prior
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import task

if TYPE_CHECKING:
    from pyrolora.inference.posterior import Posterior

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG, WEIGHTS = "posterior_config.json", "posterior.safetensors"


def save(posterior: "Posterior", folder: str | Path) -> Path:
    """Write a posterior to a folder, whole or not at all; an earlier posterior there is replaced.

    The folder holds ``posterior_config.json`` and ``posterior.safetensors``, and, for a model whose only adapter can be said
    in PEFT's format (see `Adapter.to_peft`), ``adapter_config.json`` and ``adapter_model.safetensors``: the posterior mean as
    a plain PEFT adapter, which ``PeftModel.from_pretrained`` loads without this library.

    Args:
        posterior: what to keep.
        folder: where; parents are made.

    Returns:
        The folder.

    Raises:
        FileExistsError: the place is taken by a file, or by a folder that holds something else.
    """
    folder = Path(folder).resolve()
    check_place(folder)
    with replacing_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(_config(posterior), indent=2))
        save_file(_tensors(posterior), partial / WEIGHTS)
        _write_peft(posterior, partial)
    return folder


def check_place(folder: Path) -> None:
    """Refuse a place that holds anything but a posterior: replacing it would delete what is there.

    Raises:
        FileExistsError: a file, or a folder that holds something else.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))):
        raise FileExistsError(
            f"{str(folder)!r} exists and is no posterior; it is left as it is. Choose a new or an empty folder."
        )


def _config(posterior: "Posterior") -> dict[str, Any]:
    model = posterior.model
    return {
        "format": FORMAT,
        "posterior": type(posterior).__name__,
        "backbone": {"name": model.backbone.name, "fingerprint": model.backbone.fingerprint},
        "task": model.task.name,
        "adapters": [adapter.to_dict() for adapter in model.adapters],
        "prior": model.prior.to_dict(),
        "num_data": model.num_data,
        "max_length": model.max_length,
        "guide": {name: factor.family.to_dict() for name, factor in posterior.guide.items()},
        "record": posterior.record,
    }


def _tensors(posterior: "Posterior") -> dict[str, Tensor]:
    tensors = {
        f"guide/{name}/{key}": value
        for name, factor in posterior.guide.items()
        for key, value in factor.state_dict().items()
    }
    tensors.update({f"prior/{name}/scale": scale for name, scale in posterior.model.prior.scales.items()})
    tensors.update({f"constant/{name}": value for name, value in posterior.model.constants.items()})
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _write_peft(posterior: "Posterior", folder: Path) -> None:
    model = posterior.model
    if len(model.adapters) != 1:
        names = " and ".join(type(adapter).__name__ for adapter in model.adapters)
        logger.info("PEFT has no format for %s together: the folder holds the posterior alone.", names)
        return
    sites = tuple(model.adapter_sites.values())
    exported = model.adapters[0].to_peft(model.backbone, sites, posterior.mean(), model.constants)
    if exported is None:
        return
    config, weights = exported
    config = {"base_model_name_or_path": model.backbone.name, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(
    folder: str | Path,
    backbone: Backbone | str | None = None,
    *,
    model: BayesianModel | None = None,
    data_dir: str | Path | None = None,
) -> "Posterior":
    """Read a posterior from a folder.

    Usage: ``Posterior.from_pretrained("runs/blob", backbone)``; the same generator gives the same draws as before saving.

    Args:
        folder: what `save` wrote.
        backbone: the frozen network or its name; None loads the recorded one.
        model: a model to use instead of rebuilding it, needed where the prior is a callable or the task is not registered.
        data_dir: folder with the task's files, if it was fitted from one.

    Raises:
        FileNotFoundError: no posterior there; the nearest folder that holds one is offered.
        ValueError: a damaged or foreign file, another backbone, or other sites.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The posterior in {folder} lacks {WEIGHTS}; save it again.") from error
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or truncated ({error}); save the posterior again.") from error
    constants = {key.removeprefix("constant/"): value for key, value in tensors.items() if key.startswith("constant/")}
    if model is None:
        if not isinstance(backbone, Backbone):
            backbone = load_backbone(backbone or config["backbone"]["name"])
        _check_backbone(folder, config, backbone)
        model = BayesianModel(
            backbone,
            task(config["task"], data_dir=data_dir),
            adapter=[Adapter.from_dict(entry) for entry in config["adapters"]],
            prior=Prior.specification_from_dict(config["prior"]),
            num_data=config["num_data"],
            max_length=config["max_length"],
            constants=constants,
        )
    _check_backbone(folder, config, model.backbone)
    saved, given = config["adapters"], json.loads(json.dumps([adapter.to_dict() for adapter in model.adapters]))
    if saved != given:
        # the shapes may agree and yet the scaling of the product not
        raise ValueError(
            f"The posterior in {folder} belongs to the adapters {saved}, and the model has {given}. Build the model with "
            "the adapters it was saved with."
        )
    declared, asked = config["prior"], json.loads(json.dumps(model.prior.to_dict()))
    if other := [name for name in asked if declared.get(name) != asked[name]]:
        raise ValueError(
            f"The posterior in {folder} was fitted under the prior {declared.get(other[0])} of {other[0]!r}, and the model's "
            f"is {asked[other[0]]}. Build the model with the prior it was fitted under."
        )
    # factors that were made again, on another machine say, may have other signs
    model = model.with_constants(constants)
    # one instance for all sites of one family: a family judges the sites that it was given together
    made: dict[str, Family] = {}
    families = {
        name: made.setdefault(json.dumps(entry, sort_keys=True), Family.from_dict(entry))
        for name, entry in config["guide"].items()
    }
    guide = build_guide(resolve(families, model.sites), model)
    for name, factor in guide.items():
        prefix = f"guide/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            factor.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"The posterior in {folder} does not fit the site {name!r} of shape {tuple(model.sites[name].shape)}: "
                f"{error}. Load it with the adapters it was saved with."
            ) from error
    # the model that was given keeps its own
    model = model.settled()
    model.prior.restore({name: tensors[f"prior/{name}/scale"] for name in model.prior.scales})
    return _posterior_class(config["posterior"])(model, guide, config["record"])


def read_config(folder: str | Path) -> dict[str, Any]:
    """What a saved posterior says about itself: backbone, task, adapters, prior, guide, record.

    Raises:
        FileNotFoundError: no posterior there; the nearest folder that holds one is offered.
        ValueError: a damaged file, or one of another version.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        near = nearest(folder.name, [entry.parent.name for entry in folder.parent.glob(f"*/{CONFIG}")])
        hint = f" Did you mean {str(folder.parent / near)!r}?" if near else ""
        raise FileNotFoundError(f"No posterior at {str(folder)!r}: {CONFIG} is not there.{hint}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is damaged ({error}); save the posterior again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(config).__name__}); save the posterior again.")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {config.get('format')!r}; this version reads {FORMAT}. Save it again with this version."
        )
    return config


def _check_backbone(folder: Path, config: dict[str, Any], backbone: Backbone) -> None:
    recorded = config["backbone"]
    if recorded["fingerprint"] != backbone.fingerprint:
        raise ValueError(
            f"The posterior in {folder} belongs to {recorded['name']!r} (fingerprint {recorded['fingerprint']}), not to "
            f"{backbone.name!r} (fingerprint {backbone.fingerprint}). Load it with the model it was fitted on."
        )


def _posterior_class(name: str) -> type["Posterior"]:
    from pyrolora.inference.laplace import LaplacePosterior
    from pyrolora.inference.posterior import Posterior
    from pyrolora.inference.vbll import LastLayerPosterior

    kinds = (Posterior, LaplacePosterior, LastLayerPosterior)
    known: dict[str, type[Posterior]] = {kind.__name__: kind for kind in kinds}
    if name not in known:
        raise ValueError(f"Unknown kind of posterior {name!r}; expected one of {', '.join(known)}.")
    return known[name]
