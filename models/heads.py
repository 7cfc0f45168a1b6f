"""From hidden states to one logit per class, without logits over the vocabulary at every position."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pyrolora.models.backbones import Backbone, Delta
from pyrolora.models.prototype_head import PrototypeHead
from pyrolora.models.tasks import EpisodeClasses, Format

# rows of vocabulary logits alive at once while options are scored
ROWS_AT_ONCE = 256


class Head(Protocol):
    """Turns a batch into class logits."""

    def __call__(
        self, batch: Mapping[str, Tensor], label_changes: Sequence[Delta], trunk: Tensor | None, first_block: int
    ) -> Tensor:
        """Class logits, float32, ``(rows, classes)``."""
        ...


class LabelHead:
    """Logits of the label tokens at the answer position: ``W[label_ids] @ feature``.

    Exact: the same numbers as the full model's logits at that position and those tokens.

    Args:
        backbone: the frozen network.
        label_ids: token of each class.
        keep_rows: whether the network's own label rows count; without them all logits are zero until changed.

    Shape:
        label_ids ``(classes,)``; returns ``(rows, classes)``.
    """

    def __init__(self, backbone: Backbone, label_ids: Tensor, keep_rows: bool = True) -> None:
        self.backbone = backbone
        self.weight = backbone.label_weight(label_ids).to(backbone.site_dtype)
        bias = getattr(backbone.network.get_output_embeddings(), "bias", None)
        self.bias = None if bias is None else bias[label_ids.to(bias.device)].to(backbone.site_dtype)
        if not keep_rows:
            self.weight, self.bias = torch.zeros_like(self.weight), None

    def __call__(
        self, batch: Mapping[str, Tensor], label_changes: Sequence[Delta], trunk: Tensor | None, first_block: int
    ) -> Tensor:
        """See `Head`; what ``label_changes`` return is added to the logits."""
        features = self.backbone.features(batch, trunk=trunk, first_block=first_block).to(self.weight.dtype)
        return self.from_features(features, label_changes)

    def from_features(self, features: Tensor, label_changes: Sequence[Delta] = ()) -> Tensor:
        """Class logits of features at the answer position, ``(rows, classes)`` from ``(rows, hidden)``."""
        logits = functional.linear(features, self.weight)
        for change in label_changes:
            logits = logits + change(features[:, None])[:, 0]
        return self.backbone.finish_logits(logits if self.bias is None else logits + self.bias)


class OptionHead:
    """Normalised log-likelihood of each option's tokens after the prompt, nats per unit of ``option_lengths``.

    Vocabulary logits are formed only for scored tokens, a few rows at a time, and again during backward instead of
    being kept. Missing options get minus infinity.

    Args:
        backbone: the frozen network.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __call__(
        self, batch: Mapping[str, Tensor], label_changes: Sequence[Delta], trunk: Tensor | None, first_block: int
    ) -> Tensor:
        """See `Head`; there are no label rows to change."""
        hidden = self.backbone.hidden_states(batch, trunk=trunk, first_block=first_block)
        device = hidden.device
        segments, scored = batch["segment_ids"].to(device), batch["scored"].to(device)
        rows, columns = scored.nonzero(as_tuple=True)
        positions = torch.arange(segments.shape[1], device=device)
        prompt_end = torch.where(segments == 1, positions, -1).amax(dim=1)
        # an option's first token is predicted by the prompt's last one, the others by their left neighbour
        inside = segments[rows, columns - 1] == segments[rows, columns]
        predictors = torch.where(inside, columns - 1, prompt_end[rows])
        tokens = batch["input_ids"].to(device)[rows, columns]
        log_prob = torch.cat(
            [
                checkpoint(self._token_log_prob, states, targets, use_reentrant=False)
                for states, targets in zip(
                    hidden[rows, predictors].split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True
                )
            ]
        )
        option_mask, lengths = batch["option_mask"].to(device), batch["option_lengths"].to(device)
        scores = torch.zeros(option_mask.shape, dtype=log_prob.dtype, device=device)
        scores = scores.index_put((rows, segments[rows, columns] - 2), log_prob, accumulate=True)
        return (scores / lengths.clamp(min=1)).masked_fill(~option_mask, -torch.inf)

    def _token_log_prob(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.backbone.network.get_output_embeddings()(states)
        logits = self.backbone.finish_logits(logits.to(self.backbone.site_dtype))
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def make_head(
    backbone: Backbone, format: Format, label_ids: Sequence[int] | None, keep_rows: bool
) -> LabelHead | OptionHead | PrototypeHead:
    """The head for a way of asking.

    Args:
        backbone: the frozen network.
        format: the task's format.
        label_ids: row of each class, or None where options are scored.
        keep_rows: see `LabelHead`.
    """
    if isinstance(format, EpisodeClasses):
        return PrototypeHead(backbone, format)
    if label_ids is None:
        return OptionHead(backbone)
    return LabelHead(backbone, torch.as_tensor(label_ids), keep_rows)
