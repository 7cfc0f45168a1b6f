"""Nearest class mean: logits of queries from the features of a few labelled examples."""

import torch
from torch import Tensor
from torch.nn import functional


def class_prototypes(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Mean feature of every class: ``class_prototypes(support_features, support_labels, ways=5)``.

    Source: Snell et al., "Prototypical Networks for Few-shot Learning", 2017, equation 1.

    Args:
        features: features of the labelled examples.
        labels: their classes, local to the episode, each of them at least once.
        ways: number of classes.

    Shape:
        features ``(..., examples, hidden)``, labels ``(..., examples)``; returns ``(..., ways, hidden)``

    Raises:
        ValueError: a class without an example, or an example of no class.
    """
    belongs = labels[..., None] == torch.arange(ways, device=labels.device)
    # on a GPU a look at the labels would wait for all work before it
    if labels.device.type == "cpu" and not bool(belongs.any(-2).all() and belongs.any(-1).all()):
        raise ValueError(
            f"The labelled examples have the classes {sorted(set(labels.flatten().tolist()))}; expected each of 0 to "
            f"{ways - 1} in every episode, and no other. Number the classes anew in each episode."
        )
    members = belongs.to(features.dtype)
    return members.mT @ features / members.sum(-2)[..., None]


def cosine_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every feature with every prototype: ``cosine_similarity(query_features, prototypes)``.

    Shape:
        features ``(..., examples, hidden)``, prototypes ``(..., ways, hidden)``; returns ``(..., examples, ways)``
    """
    return functional.normalize(features, dim=-1) @ functional.normalize(prototypes, dim=-1).mT


def prototype_logits(
    queries: Tensor, support: Tensor, labels: Tensor, ways: int, scale: Tensor | float = 10.0, bias: float = 0.0
) -> Tensor:
    """Class logits ``scale (cos(query, prototype) + bias)``: ``prototype_logits(queries, support, labels, ways=5)``.

    The bias is the same for every class, so no probability depends on it; it is there because the published classifier has
    it, and its logits are compared.

    Source: Hu et al., "Pushing the Limits of Simple Pipelines for Few-Shot Learning", 2022, section 3.2.

    Args:
        queries: features of the queries.
        support: features of the labelled examples.
        labels: classes of the labelled examples, local to the episode.
        ways: number of classes.
        scale: inverse temperature of the cosines; 10 where the published training starts.
        bias: added to every cosine.

    Shape:
        queries ``(..., queries, hidden)``, support ``(..., examples, hidden)``, labels ``(..., examples)``; returns
        ``(..., queries, ways)``
    """
    cosines = cosine_similarity(queries, class_prototypes(support, labels, ways))
    return torch.as_tensor(scale, dtype=cosines.dtype, device=cosines.device) * (cosines + bias)
