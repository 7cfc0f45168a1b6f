"""A small self-attentive sequence model of items, trained here: item embeddings and the state that gates read."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from pyrolora.models.atomic import replacing
from pyrolora.models.randomness import seeded

logger = logging.getLogger(__name__)

PADDING = -1


class SASRec(nn.Module):
    """One block of causal self-attention over the last items of a user.

    Usage::

        encoder = fit_sasrec(sequences, items=1682)
        encoder.states([[4, 8, 15, 16, 23]])                # (1, 64), what MixtureLoRA's gate reads

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018; trained by cross-entropy over all items in
    place of sampled negatives.

    Args:
        items: number of items.
        features: width of embeddings and states.
        length: items that it looks back.
        dropout: share of activations dropped in training.
    """

    def __init__(self, items: int, features: int = 64, length: int = 10, dropout: float = 0.2) -> None:
        super().__init__()
        self.settings = {"items": items, "features": features, "length": length, "dropout": dropout}
        # the row after the last item is padding
        self.item_embeddings = nn.Embedding(items + 1, features, padding_idx=items)
        self.positions = nn.Embedding(length, features)
        self.before_attention, self.before_mixing, self.last_norm = (nn.LayerNorm(features) for _ in range(3))
        self.attention = nn.MultiheadAttention(features, 1, dropout=dropout, batch_first=True)
        self.mixing = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, features))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.item_embeddings.weight, std=features**-0.5)
        nn.init.normal_(self.positions.weight, std=features**-0.5)

    @property
    def items(self) -> int:
        """Number of items."""
        return self.item_embeddings.num_embeddings - 1

    @property
    def length(self) -> int:
        """Items that it looks back."""
        return self.positions.num_embeddings

    def forward(self, items: Tensor) -> Tensor:
        """State after each item.

        Args:
            items: numbers of items, earliest first, padded on the left with `PADDING`.

        Shape:
            ``(rows, length)`` to ``(rows, length, features)``
        """
        missing = items == PADDING
        hidden = self.item_embeddings(items.masked_fill(missing, self.items)) + self.positions.weight
        hidden = self.dropout(hidden)
        later = torch.ones(self.length, self.length, dtype=torch.bool, device=items.device).triu(1)
        # a padded position that sees nothing would be a softmax over nothing: let it see itself
        itself = torch.eye(self.length, dtype=torch.bool, device=items.device)
        blocked = (later | missing[:, None]) & ~itself
        normed = self.before_attention(hidden)
        attended, _ = self.attention(normed, normed, normed, attn_mask=blocked, need_weights=False)
        hidden = hidden + attended
        hidden = hidden + self.dropout(self.mixing(self.before_mixing(hidden)))
        return self.last_norm(hidden)

    def scores(self, states: Tensor) -> Tensor:
        """Logits of all items, ``(..., items)`` from states ``(..., features)``."""
        return functional.linear(states, self.item_embeddings.weight[:-1])

    @torch.no_grad()
    def states(self, histories: Sequence[Sequence[int]], batch_size: int = 1024) -> Tensor:
        """State after the last item of each history, ``(histories, features)`` on the CPU.

        Raises:
            ValueError: an empty history, or an item that the model does not know.
        """
        training, device = self.training, self.positions.weight.device
        self.eval()
        padded = left_padded(histories, self.length, self.items)
        found = [self(rows.to(device))[:, -1].cpu() for rows in padded.split(batch_size)]
        self.train(training)
        return torch.cat(found)

    def save(self, path: str | Path) -> None:
        """Write weights and settings as one safetensors file."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata={"settings": json.dumps(self.settings)})

    @classmethod
    def load(cls, path: str | Path) -> "SASRec":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            model = cls(**json.loads(file.metadata()["settings"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
        return model.eval()


def left_padded(histories: Sequence[Sequence[int]], length: int, items: int) -> Tensor:
    """The last ``length`` items of each history, padded on the left, ``(histories, length)``.

    Raises:
        ValueError: an empty history, or a number that is no item.
    """
    padded = torch.full((len(histories), length), PADDING)
    for row, history in enumerate(histories):
        if not len(history):
            raise ValueError(f"History {row} is empty; a state needs one item or more.")
        last = torch.as_tensor(list(history)[-length:])
        if last.min() < 0 or last.max() >= items:
            raise ValueError(f"History {row} holds an item outside 0 to {items - 1}: {last.tolist()}.")
        padded[row, -len(last) :] = last
    return padded


def fit_sasrec(
    sequences: Sequence[Sequence[int]],
    items: int,
    *,
    features: int = 64,
    length: int = 10,
    epochs: int = 30,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> SASRec:
    """Train a SASRec to say each next item: ``fit_sasrec(list(interactions.of_user.values()), items=1682)``.

    Args:
        sequences: every training user's items, earliest first.
        items: number of items.
        features: width of embeddings and states.
        length: items that it looks back.
        epochs: passes over the sequences, cut into overlapping pieces.
        batch_size: pieces a step.
        learning_rate: of Adam.
        device: where it is trained; it comes back on the CPU.
        seed: of weights, order and dropout.
        progress: show a bar.

    Raises:
        ValueError: no sequence of two items or more.
    """
    pieces = [
        sequence[max(0, end - length - 1) : end]
        for sequence in sequences
        for end in {len(sequence), *range(length + 1, len(sequence), max(1, length // 2))}
        if len(sequence) > 1
    ]
    if not pieces:
        raise ValueError("No user has two items, so there is nothing to learn what comes next from.")
    inputs = left_padded([piece[:-1] for piece in pieces], length, items)
    targets = left_padded([piece[1:] for piece in pieces], length, items)
    with seeded(seed, device):
        model = SASRec(items, features, length).to(device).train()
        optimiser = torch.optim.Adam(model.parameters(), learning_rate, betas=(0.9, 0.98))
        bar = tqdm(range(epochs), desc="sasrec", disable=not progress, leave=False)
        for _ in bar:
            total = 0.0
            for chosen in torch.randperm(len(pieces)).split(batch_size):
                wanted = targets[chosen].to(device)
                logits = model.scores(model(inputs[chosen].to(device)))
                loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PADDING)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach()) * len(chosen)
            bar.set_postfix(loss=f"{total / len(pieces):.3f}")
    return model.eval().cpu()
