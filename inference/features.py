"""Features of a data set under fixed adapter weights, computed once and kept on disk."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.inference.digests import data_digest, tensor_digest
from pyrolora.models.adapters.last_layer import HEAD
from pyrolora.models.atomic import replacing
from pyrolora.models.cache import cache_folder
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of a data set, rows in its order.

    Attributes:
        values: ``(examples, hidden)``.
        labels: ``(examples,)``.
    """

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FeatureCache:
    """Computes features with one pass of the network, and keeps them.

    Usage::

        features = FeatureCache().features(model, map_posterior.mean(), task.train)

    A file is keyed by the network and its float type, the adapters and their weights, and the encoded data; a change of any
    of them is another file. Sites of the last layer play no part.

    Args:
        folder: where files are kept; None keeps none. ``"default"`` is ``features`` in pyrolora's cache folder.
        batch_size: examples at once.
    """

    folder: str | Path | None = "default"
    batch_size: int = 32

    def path(self, identity: Mapping[str, Any]) -> Path | None:
        """The file of an identity, or None where nothing is kept."""
        if self.folder is None:
            return None
        folder = cache_folder() / "features" if self.folder == "default" else Path(self.folder)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        return folder / f"{key}.safetensors"

    @torch.no_grad()
    def features(
        self, model: BayesianModel, draw: Mapping[str, Tensor], data: Split | EncodedSplit, *, progress: bool = False
    ) -> Features:
        """Features of a split under one value of every site inside the network.

        Args:
            model: the model.
            draw: site name -> value, such as ``posterior.mean()``.
            data: the split.
            progress: show a bar.

        Raises:
            ValueError: a damaged file.
        """
        encoded = model.encode(data)
        identity = feature_identity(model, draw, encoded)
        path = self.path(identity)
        if path is not None and path.is_file():
            return load_features(path, identity, model)
        values = torch.empty(len(encoded), model.backbone.hidden_size, dtype=model.backbone.site_dtype)
        total = encoded.steps_per_epoch(self.batch_size)
        for batch in tqdm(
            encoded.batches(self.batch_size), total=total, desc="features", disable=not progress, leave=False
        ):
            values[batch["index"]] = model.features(batch, draw).cpu()
        model.release()
        if path is not None:
            with replacing(path) as partial:
                kept = {"features": values, "labels": encoded.labels}
                save_file(kept, partial, metadata={"identity": json.dumps(identity)})
        return Features(values.to(model.backbone.device), encoded.labels.to(model.backbone.device))


def feature_identity(model: BayesianModel, draw: Mapping[str, Tensor], data: EncodedSplit) -> dict[str, str]:
    """What features depend on: network, float type, adapters with their weights and constants, and data, as short texts."""
    inside = {name: draw[name] for name in model.adapter_sites if name != HEAD}
    weights = tensor_digest({**model.constants, **inside})
    adapters = [adapter.to_dict() for adapter in model.adapters if adapter.to_dict()["adapter"] != "LastLayer"]
    return {
        "model": model.backbone.fingerprint,
        "dtype": str(model.backbone.dtype),
        "adapter": hashlib.sha256((json.dumps(adapters) + weights).encode()).hexdigest()[:16],
        "data": data_digest(data),
    }


def load_features(path: str | Path, identity: Mapping[str, str], model: BayesianModel) -> Features:
    """Read a file of features that must belong to a model, its adapter weights and a data set.

    Args:
        path: the file.
        identity: what `feature_identity` says of them.
        model: the model, for its device.

    Raises:
        ValueError: a damaged file, or one of another model, adapter or data set; the first difference is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads(file.metadata()["identity"])
            values, labels = file.get_tensor("features"), file.get_tensor("labels")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The feature cache {path} is damaged ({error}). Delete it; it is made again.") from error
    for key, value in identity.items():
        if stored.get(key) != value:
            raise ValueError(
                f"The feature cache {path} is of another {key}: it was made with {stored.get(key)!r}, and {value!r} is in "
                "use. Delete it, or use another folder."
            )
    logger.info("Features of %d examples from %s", len(values), path)
    return Features(values.to(model.backbone.device), labels.to(model.backbone.device))
