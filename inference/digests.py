"""Short hashes of data and tensors, by which kept results are told to belong to a fit."""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from pyrolora.models.tasks import EncodedSplit


def data_digest(data: EncodedSplit) -> str:
    """Number of rows, and a hash of all tokens, labels and vectors."""
    digest = hashlib.sha256(repr(data.described).encode())
    for row in data.rows:
        digest.update(repr(row).encode())
    if data.vectors:
        digest.update(tensor_digest(data.vectors).encode())
    return f"{len(data)}:{digest.hexdigest()[:16]}"


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names and values, whatever the order."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
