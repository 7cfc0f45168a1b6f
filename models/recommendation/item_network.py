"""A tiny language model whose words are items: sequential recommendation at a size that a test can train."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from pyrolora.models.backbones import Backbone
from pyrolora.models.randomness import seeded
from pyrolora.models.recommendation.windows import Window

logger = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<eos>", "<unk>", "among", "next")


def item_tokenizer(items: int) -> Any:
    """A tokenizer with one token an item, ``i0`` and so on, and the words of the prompt of ``next_item_tokens``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *(f"i{number}" for number in range(items))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def fit_item_network(
    windows: Sequence[Window],
    items: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    epochs: int = 3,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Backbone:
    """Train a tiny Llama to say the next item of a prompt ``history among candidates next``, all weights at once.

    Usage::

        backbone = fit_item_network(windows_of(interactions, users), len(interactions.titles))
        backbone.network.save_pretrained("runs/items"), backbone.tokenizer.save_pretrained("runs/items")
        load_backbone("runs/items")

    It is the frozen network of a small experiment; adapters are then fitted to `task` ``next_item_tokens``. Every item of the
    history after the first is predicted as well, candidates are not.

    Args:
        windows: windows of one number of candidates.
        items: number of items.
        hidden: width.
        layers: number of blocks.
        epochs: passes over the windows.
        batch_size: windows a step.
        learning_rate: of AdamW.
        device: where it is trained, and stays.
        seed: of weights and order.
        progress: show a bar.

    Raises:
        ValueError: no window, or windows of different sizes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = sorted({(len(window.history), len(window.candidates)) for window in windows})
    if len(sizes) != 1:
        raise ValueError(f"Windows of one size are needed; these have {sizes or 'none'} (history, candidates).")
    (history, _), first = sizes[0], len(SPECIAL)
    among, following = SPECIAL.index("among"), SPECIAL.index("next")
    rows = torch.tensor(
        [
            [*(i + first for i in w.history), among, *(i + first for i in w.candidates), following, w.target + first]
            for w in windows
        ]
    )
    counted = torch.zeros(rows.shape[1], dtype=torch.bool)
    counted[1:history], counted[-1] = True, True
    config = LlamaConfig(
        vocab_size=first + items,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with seeded(seed, device):
        network: Any = LlamaForCausalLM(config)
        network.to(device).train()
        optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
        steps = epochs * -(-len(rows) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps)
        bar = tqdm(total=steps, desc="item network", disable=not progress, leave=False)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows)).split(batch_size):
                tokens = rows[chosen].to(device)
                hidden_states = network.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
                # logits of what counts only
                logits = network.lm_head(hidden_states[:, counted[1:]])
                loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, counted].flatten())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        bar.close()
    return Backbone(network, item_tokenizer(items), "item network")


def save_item_network(backbone: Backbone, folder: str | Path) -> None:
    """Write network and tokenizer where `load_backbone` reads them."""
    backbone.network.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
