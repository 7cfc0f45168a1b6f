"""A fitted vision model as one plain network: adapters in its weights, the class head on top."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters.base import PROGRESS
from pyrolora.models.serving import merged
from pyrolora.models.vision import VisionBackbone

# largest difference of a logit that rounding explains, as a share of the largest logit
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
PROBES = 4


@torch.no_grad()
def merge(posterior: Posterior, draw: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """One draw as a plain ``transformers`` image classifier, which needs nothing of this library.

    Usage::

        merge(posterior).save_pretrained("runs/merged")                       # the posterior mean
        one = merge(posterior, {name: value[0] for name, value in posterior.sample(1).items()})

    The classifier reads images that are normalised as the backbone's own processor does it. Merging a draw is exact. The
    mean's network is not the mean of the networks: with A and B independent the mean of the weights is right, their variance
    and what the nonlinearities make of it are lost.

    Before it is returned its logits are compared with the model's own on a few random images.

    Args:
        posterior: a posterior over adapters of a vision backbone, on a task of images.
        draw: site name -> value of the site's shape; None for the posterior mean.

    Raises:
        ValueError: a backbone of text, a gate for each row, a router that has not faded yet, a network without an image
            classifier in ``transformers``, or logits that differ by more than rounding.
    """
    model, backbone = posterior.model, posterior.model.backbone
    if not isinstance(backbone, VisionBackbone):
        raise ValueError(
            f"merge makes an image classifier, and {backbone.name!r} reads text. Use merged(model, draw), which gives the "
            "language model with the draw in its weights."
        )
    draw = posterior.mean() if draw is None else draw
    for adapter in model.adapters:
        if read := [key for key in adapter.context_keys if key != PROGRESS]:
            raise ValueError(
                f"{type(adapter).__name__} is another network for every value of {read[0]!r}, and merge makes one. Use "
                f"merged(model, draw, {{{read[0]!r}: row[None]}}) for the network of one row."
            )
    if model.gates(draw, posterior.context):
        fading = ", ".join(str(adapter) for adapter in model.adapters if PROGRESS in adapter.context_keys)
        raise ValueError(
            f"After {posterior.progress:.0%} of the training the router has not faded: without it the network is another. "
            f"Train {fading} until fade_end, and merge then."
        )
    classifier = _empty_classifier(posterior)
    with merged(model, draw, posterior.context) as network:
        body = {name: value.clone() for name, value in network.state_dict().items()}
    classifier.base_model.load_state_dict(body)
    # the head is linear in the features: its weights are what it makes of the axes, its bias what it makes of zero
    axes = torch.eye(backbone.hidden_size, device=backbone.device, dtype=backbone.site_dtype)
    bias = model.feature_logits(torch.zeros_like(axes[:1]), draw)[0]
    weight = (model.feature_logits(axes, draw) - bias).mT
    classifier.classifier.weight.zero_()
    # DINOv2's classifier reads the mean of the patches beside the class token: those columns stay zero
    classifier.classifier.weight[:, : weight.shape[1]].copy_(weight)
    classifier.classifier.bias.copy_(bias)
    _check(posterior, draw, classifier)
    return classifier


def _empty_classifier(posterior: Posterior) -> Any:
    backbone, labels = posterior.model.backbone, posterior.model.task.labels
    config = copy.deepcopy(backbone.network.config)
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    try:
        with torch.random.fork_rng(devices=[]):
            made: Any = AutoModelForImageClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"transformers has no image classifier of the type {config.model_type!r}, so {backbone.name!r} cannot become "
            "one. Use merged(model, draw), which gives the network without its head."
        ) from error
    return made.to(device=backbone.device, dtype=backbone.dtype).eval()


def _check(posterior: Posterior, draw: Mapping[str, Tensor], classifier: Any) -> None:
    """Refuse a network that does not compute what the model computes."""
    model, backbone = posterior.model, posterior.model.backbone
    size, generator = backbone.image_size, torch.Generator().manual_seed(0)  # type: ignore[attr-defined]
    images = torch.rand(PROBES, backbone.channels, size, size, generator=generator)  # type: ignore[attr-defined]
    ours = model.row_logits({"pixel_values": images, **posterior.context}, draw)
    model.release()
    theirs = classifier(**backbone._inputs({"pixel_values": images})).logits.to(ours.dtype)
    allowed = TOLERANCE.get(backbone.dtype, 5e-2) * max(1.0, float(ours.abs().max()))
    if not float((ours - theirs).abs().max()) <= allowed:
        raise ValueError(
            f"The merged network's logits differ by {float((ours - theirs).abs().max()):.2g} from the model's, more than "
            f"rounding explains ({allowed:.2g}). An adapter changes more than weights; use the posterior as it is."
        )
