"""The last layer of a model as a linear map with a Normal prior, apart from the network below it."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from pyrolora.guides.base import Guide
from pyrolora.guides.vbll import LogitMoments, logit_moments
from pyrolora.models.adapters.last_layer import HEAD, LastLayer
from pyrolora.models.heads import LabelHead
from pyrolora.models.program import BayesianModel
from pyrolora.models.sites import Site


class LastLayerHead:
    """What a last-layer engine needs of a model: inputs, fixed part of the logits, prior.

    Usage::

        head = LastLayerHead(model)
        moments = head.moments(guide_factor.distribution(), features)

    Args:
        model: a model with a `LastLayer` adapter.

    Raises:
        ValueError: no `LastLayer`, several, another adapter that changes the label rows, one that gives a row several feature
            vectors, or a network that bends its logits.
    """

    def __init__(self, model: BayesianModel) -> None:
        layers = [adapter for adapter in model.adapters if isinstance(adapter, LastLayer)]
        if len(layers) != 1 or not isinstance(model.head, LabelHead):
            raise ValueError(
                f"A Bayesian last layer needs one site head.weight; the model's sites are {', '.join(model.sites)}. Add "
                "LastLayer() to the model's adapters."
            )
        others = [type(adapter).__name__ for adapter in model.label_adapters if adapter is not layers[0]]
        if others:
            raise ValueError(
                f"{others[0]} changes the label rows as well, so the logits are no function of head.weight and the features "
                f"alone. Leave {others[0]} out, or its embeddings where it changes them, or use SVI or Laplace."
            )
        if not one_feature_vector(model):
            raise ValueError(
                "A last layer needs one feature vector a row, and an adapter draws or sums out something for each row, such "
                "as the gate of MixtureLoRA. Use gate='deterministic', or SVI or MAP with the gate as it is."
            )
        self.layer, self.model, self.label_head = layers[0], model, model.head
        probe = torch.tensor([1.0, 1000.0], dtype=torch.float64)
        finished = model.backbone.finish_logits(probe)
        self.gain = float(finished[0])
        if not torch.allclose(finished, self.gain * probe):
            raise ValueError(
                f"{model.backbone.name} caps its logits, so they are no linear function of the last layer and have no "
                "closed-form moments. Use SVI or Laplace."
            )

    @property
    def site(self) -> Site:
        """The site ``head.weight``."""
        return self.model.sites[HEAD]

    def inputs(self, features: Tensor) -> Tensor:
        """What the site's matrix is multiplied with, ``(rows, columns of the site)``."""
        return self.gain * self.layer.inputs(features)

    def offset(self, features: Tensor) -> Tensor:
        """The part of the logits that the site does not change, ``(rows, classes)``."""
        logits = functional.linear(features, self.label_head.weight.to(features))
        bias = self.label_head.bias
        return self.gain * (logits if bias is None else logits + bias.to(features))

    def complete(self, moments: LogitMoments, offset: Tensor) -> LogitMoments:
        """Moments of all classes from those of the site's rows, which may lack the first class."""
        mean, spread = moments
        if self.layer.identified:
            mean = functional.pad(mean, (1, 0))
            spread = functional.pad(spread, (1, 0) if moments.independent else (1, 0, 1, 0))
        return LogitMoments(offset + mean, spread)

    def moments(self, q: Any, features: Tensor) -> LogitMoments:
        """Moments of the logits of features under a Normal posterior of the site."""
        return self.complete(logit_moments(q, self.inputs(features)), self.offset(features))

    def logits(self, features: Tensor, weights: Tensor) -> Tensor:
        """Logits of features under draws of the site, ``(draws, rows, classes)`` from ``(draws, *site.shape)``."""
        logits = self.inputs(features) @ weights.mT
        return self.offset(features) + (functional.pad(logits, (1, 0)) if self.layer.identified else logits)

    def factor(self, guide: Guide) -> Any:
        """The guide's factor of the site."""
        return dict(guide.items())[HEAD]

    def normal_prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every weight under the prior, each of the site's shape.

        Raises:
            ValueError: a prior that is no factorised Normal.
        """
        prior = self.model.prior(self.site)
        base = prior.base_dist if isinstance(prior, dist.Independent) else prior
        if not isinstance(base, dist.Normal):
            raise ValueError(
                f"This engine needs a Normal prior on head.weight; it is a {type(base).__name__}. Declare "
                '{"head.weight": logit_scale(2.0), ...} or dist.Normal(0., 0.1) there.'
            )
        return base.loc.expand(self.site.shape), base.scale.expand(self.site.shape)


def one_feature_vector(model: BayesianModel) -> bool:
    """Whether a row's features are a function of the sites, nothing being drawn or summed out for single rows."""
    return not (model.draws_locally or model.enumerates)


def only_random_in_the_head(model: BayesianModel, guide: Guide) -> bool:
    """Whether a posterior's draws differ in ``head.weight`` alone, so that one pass of the network serves them all."""
    # without parameters a factor may still hold draws; a point has nothing but its value
    random = [name for name, factor in guide.items() if set(factor.roles.values()) - {"point", "manifold"}]
    probe = torch.tensor([1.0, 1000.0])
    finished = model.backbone.finish_logits(probe)
    alone = random == [HEAD] and len(model.label_adapters) == 1 and one_feature_vector(model)
    return alone and bool(torch.allclose(finished, finished[0] * probe))


@dataclass(frozen=True)
class HeadData:
    """A training set as the last layer sees it, in double precision on the device of the features.

    Attributes:
        inputs: ``(examples, columns of the site)``.
        offset: fixed part of the logits, ``(examples, classes)``.
        labels: ``(examples,)``.
        weight: how many examples each stands for, where they are a sample of a larger set or a posterior is cold.
    """

    inputs: Tensor
    offset: Tensor
    labels: Tensor
    weight: float = 1.0

    @staticmethod
    def of(head: LastLayerHead, features: Tensor, labels: Tensor, weight: float = 1.0) -> "HeadData":
        """From features and labels.

        Raises:
            ValueError: features that are not finite, labels outside the classes, or a class that no example has.
        """
        classes = head.offset(features[:1]).shape[-1]
        check_features(features, labels, classes)
        missing = sorted(set(range(classes)) - set(labels.tolist()))
        if missing:
            names = [str(head.model.task.labels[k]) for k in missing] if head.model.task.labels else missing
            raise ValueError(
                f"No training example has the class {names[0]!r} (classes without examples: {missing}); its weights would be "
                "the prior's. Raise train_size or choose another seed."
            )
        double = features.double()
        return HeadData(head.inputs(double), head.offset(double), labels.to(features.device), weight)

    def __len__(self) -> int:
        return len(self.labels)


def check_features(features: Tensor, labels: Tensor | None, classes: int) -> None:
    """Refuse features and labels that no last layer can be fitted to.

    Raises:
        ValueError: features that are not finite, or labels outside the classes; the first bad row is named.
    """
    bad = ~features.isfinite().all(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"The features of row {row} are not finite ({int(bad.sum())} such rows of {len(features)}). The network "
            "overflows on them: load it in float32 or bfloat16, or drop those rows."
        )
    if labels is not None:
        outside = (labels < 0) | (labels >= classes)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"The label {int(labels[row])} of row {row} is none of the {classes} classes 0 to {classes - 1}. Encode the "
                "data with the model's own task."
            )
