"""Loading backbones: by short name, GGUF file, folder or hub id, in a float type that suits the device."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pyrolora.models.backbones import Backbone
from pyrolora.models.cache import made_once
from pyrolora.models.devices import as_device
from pyrolora.models.float_types import as_dtype, attention_of
from pyrolora.models.naming import nearest
from pyrolora.models.packaged import PACKAGED, SHORT_NAMES, packaged_file
from pyrolora.models.vision import is_vision, load_vision


def load_backbone(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load and freeze a causal language model or a vision transformer: ``load_backbone("smollm2-135m", dtype="bfloat16")``.

    Args:
        name_or_path: a short name (``smollm2-135m`` and ``dinov2-small``, packaged, no network; ``tiny-vit``, of random
            weights), a ``.gguf`` file, a local folder in ``transformers`` format, or a hub id. A vision transformer reads
            images of another size where it is named, as in ``dinov2-small@126``: its positions are interpolated to it.
        dtype: type of the frozen weights: ``torch.float32`` (default), ``torch.bfloat16``, their names, or
            ``"auto"`` for `native_dtype`. Adapter sites are float32 in every case.
        device: where the network lives.

    Returns:
        Backbone: ``.network`` is the plain transformers model, ``.tokenizer`` its tokenizer; a
        `pyrolora.models.vision.VisionBackbone` for images.

    Raises:
        FileNotFoundError: the packaged model is not installed, or the file or folder does not exist.
        ValueError: the name is neither known nor a path nor found on the hub (the nearest short name is offered), the
            folder is incomplete, the dtype is not of floating point, or the device is unknown or not there.
    """
    device = as_device(device)
    dtype = as_dtype(dtype, device)
    name = str(name_or_path)
    path = Path(name)
    if is_vision(name):
        return load_vision(name, dtype=dtype, device=device)
    if name in PACKAGED:
        folder = _dequantised(packaged_file(name))
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"No GGUF file at {name!r}. Give the path of an existing .gguf file.")
        folder = _dequantised(path)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"The folder {name!r} holds no config.json, so it is not a transformers model.")
        folder = path
    else:
        folder = None
    try:
        source = name if folder is None else str(folder)
        network: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attention_of(dtype, device)
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if folder is not None:
            raise ValueError(
                f"The model in {str(folder)!r} cannot be loaded; its files are missing or damaged: {error}"
            ) from error
        raise ValueError(
            f"Unknown model {name!r}: no short name, no local file or folder, and not found on the hub. "
            f"Did you mean {nearest(name, SHORT_NAMES)!r}? Short names: {', '.join(SHORT_NAMES)}."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Backbone(network.to(device=device), tokenizer, name)


def _dequantised(file: Path) -> Path:
    """Folder with the float32 weights of a GGUF file, made on first use (GGUF dequantises in Python, slowly)."""

    def write(folder: Path) -> None:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        network = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        settings = {key: value for key, value in network.config.to_dict().items() if key != "quantization_config"}
        # a GGUF-loaded network refuses save_pretrained, so its weights move into a plain one of the same configuration
        config = AutoConfig.for_model(**copy.deepcopy(settings))
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(network.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once(file, write, "Dequantising")
