"""Frozen transformers and the two exact short cuts that adapters need: label rows only, trunk once."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.models.answer_position import PROBE_TOKENS, AnswerPosition, recomputes
from pyrolora.models.blocks import Catch, Passing, Resume, find_blocks
from pyrolora.models.tasks import EncodedSplit, Format, Split, encode

Delta = Callable[[Tensor], Tensor]
# from a projection's input and its changed output to what the projection returns
OutputGate = Callable[[Tensor, Tensor], Tensor]

# the entry of a batch that stands for what `Backbone.prompt_embedding` makes
PROMPT = "prompt"


class Backbone:
    """A frozen causal language model, its tokenizer, and hooks where adapters add their change.

    Usage::

        backbone = load_backbone("smollm2-135m")
        features = backbone.features(batch)              # (batch, hidden) at the answer position

    The network is held as it came from ``transformers``: no weight is wrapped, renamed or copied. Adapters reach
    it through forward hooks that add ``delta(input)`` to a projection's output while a draw is bound. A draw stays
    bound until `release`, because gradient checkpointing runs the hooks again during backward.

    Args:
        network: a ``transformers`` causal language model; it is set to eval mode and frozen here.
        tokenizer: the tokenizer that belongs to it.
        name: what the user asked for, kept for reports and saved posteriors.
    """

    # kinds of formats (see `pyrolora.models.tasks.Format`) whose examples the network reads
    formats: ClassVar[tuple[str, ...]] = ("label", "option")

    def __init__(self, network: PreTrainedModel, tokenizer: Any, name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.body: Any = network.base_model
        self.blocks = find_blocks(self.body)
        # networks with ALiBi count positions by themselves, and some swallow the argument without a word
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self._deltas: Mapping[str, Delta] = {}
        self._gates: Mapping[str, OutputGate] = {}
        self._by_position = True
        # path of a projection -> id of the hook that adds a change to its output
        self._hooked: dict[str, int] = {}
        self._fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        """Device of the network's weights."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the network's weights."""
        return self.network.dtype

    @property
    def site_dtype(self) -> torch.dtype:
        """Type of adapter sites, draws and KL: float32 over any half-precision backbone, float64 over float64."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def hidden_size(self) -> int:
        """Width of the features that `features` returns."""
        return self.label_weight().shape[-1]

    @property
    def embedding_size(self) -> int:
        """Width of the input embeddings."""
        return self.network.get_input_embeddings().weight.shape[-1]

    @torch.no_grad()
    def prompt_embedding(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean input embedding of each row's prompt, without options that follow it, ``(rows, embedding_size)``."""
        read = batch["segment_ids"] == 1 if "segment_ids" in batch else batch["attention_mask"].bool()
        mask = read.to(self.device)[..., None]
        embedded = self.network.get_input_embeddings()(batch["input_ids"].to(self.device)).to(self.site_dtype)
        return (embedded * mask).sum(1) / mask.sum(1).clamp(min=1)

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration and of sampled weights, the same for float32 and bfloat16 copies."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self.network.config.model_type.encode())
            for name, weight in sorted(self.network.named_parameters()):
                digest.update(f"{name}{tuple(weight.shape)}".encode())
                # bfloat16 is what a float32 and a bfloat16 copy of one checkpoint have in common
                head = weight.detach().flatten()[:16].to("cpu", torch.bfloat16).view(torch.int16)
                digest.update(head.numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def bind(
        self,
        deltas: Mapping[str, Delta],
        gates: Mapping[str, OutputGate] | None = None,
        *,
        by_position: bool = False,
    ) -> None:
        """Add ``deltas[path](input)`` to the output of the projection at each path until `release` or the next bind.

        Args:
            deltas: module path -> function of the projection's input ``(rows, tokens, in)`` that returns
                ``(rows, tokens, out)``.
            gates: module path -> function of the same input and of the changed output, bias and all, that returns what the
                projection then gives, ``(rows, tokens, out)``.
            by_position: whether each function maps every position by itself, so that it may be asked for some of them only.
        """
        gates = {} if gates is None else gates
        for path in (deltas.keys() | gates.keys()) - self._hooked.keys():
            # first of all, so that hooks which restrict positions see the sum
            hook = self.network.get_submodule(path).register_forward_hook(self._changing(path), prepend=True)
            self._hooked[path] = hook.id
        self._deltas, self._gates, self._by_position = deltas, gates, by_position

    def release(self) -> None:
        """Forget the bound draw, and with it the graph of the last step."""
        self._deltas, self._gates, self._by_position = {}, {}, True
        self._restrict(None)

    def _changing(self, path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            delta, gate = self._deltas.get(path), self._gates.get(path)
            # what an embedding reads says nothing of the type that it writes
            changed = output if delta is None else output + delta(args[0]).to(output.dtype)
            return changed if gate is None else gate(args[0], changed).to(output.dtype)

        return hook

    def checkpoint_gradients(self) -> None:
        """Recompute activations during backward instead of keeping them: less memory, about a third more time.

        Only the modules that checkpoint are put into training mode, so dropout stays off; the non-reentrant form is the one
        under which a bound draw gives the same gradients.
        """
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self.network.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True

    def hidden_states(
        self, batch: Mapping[str, Tensor], *, trunk: Tensor | None = None, first_block: int = 0
    ) -> Tensor:
        """Final hidden states of every position, after the last norm.

        Args:
            batch: ``input_ids``, ``attention_mask`` and, for rows that hold several options, ``position_ids`` and
                ``segment_ids``.
            trunk: output of `trunk` for the same ``first_block``, to skip the blocks below it.
            first_block: index of the first block that runs when ``trunk`` is given.

        Shape:
            ``(rows, tokens, hidden)``
        """
        self._restrict(None)
        return self._run(self._inputs(batch), trunk, first_block)

    def _run(self, inputs: Mapping[str, Any], trunk: Tensor | None, first_block: int) -> Tensor:
        if trunk is None:
            return self.body(**inputs).last_hidden_state
        with self._swapped(range(first_block), Resume(trunk)):
            return self.body(**inputs).last_hidden_state

    @cached_property
    def _answer_position(self) -> AnswerPosition:
        """The part of the last block that runs at the answer position alone, found on first use."""
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(1, PROBE_TOKENS, self.hidden_size, generator=generator).to(self.device, self.dtype)
        inputs = self._traced_input()
        bound, self._deltas = self._deltas, {}
        try:
            return AnswerPosition(
                self.network, self.blocks, lambda rows: self._run(inputs, rows, len(self.blocks) - 1), sample
            )
        finally:
            self._deltas = bound

    def _traced_input(self) -> dict[str, Any]:
        tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        return self._inputs({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})

    def _restrict(self, positions: Tensor | None) -> None:
        """Run the last block at one position a row where that changes nothing, or at all of them again."""
        if positions is not None and self._by_position:
            self._answer_position.restrict(positions, self._hooked.values())
        elif "_answer_position" in vars(self):
            self._answer_position.positions = None

    @cached_property
    def _blocks_return_tuples(self) -> bool:
        """Whether the network takes the first entry of what a block returns; seen in a forward of one token."""
        returned: list[Any] = []
        with torch.no_grad(), self._unbound(), self._observed(self.blocks[0], returned.append):
            self.body(**self._smallest_input())
        return isinstance(returned[0], tuple)

    @staticmethod
    @contextmanager
    def _observed(block: nn.Module, look: Callable[[Any], Any]) -> Iterator[None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            look(output)

        handle = block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _smallest_input(self) -> dict[str, Any]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.device), "use_cache": False}

    def encode(self, split: Split, format: Format, max_length: int) -> EncodedSplit:
        """A split as the network reads it; see `pyrolora.models.tasks.encode`."""
        return encode(split, format, self.tokenizer, max_length=max_length)

    def token_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Which tokens of a batch are not padding, ``(rows, tokens)``."""
        return batch["attention_mask"]

    def features(self, batch: Mapping[str, Tensor], *, trunk: Tensor | None = None, first_block: int = 0) -> Tensor:
        """Hidden state at the answer position: the last token that is not padding, left- or right-padded.

        The last block computes its keys and values at all positions and the rest at this one, where the network's structure
        and the bound draw allow it (`AnswerPosition`); under gradient checkpointing that holds until `release`.

        Args:
            batch: see `hidden_states`.
            trunk: see `hidden_states`.
            first_block: see `hidden_states`.

        Shape:
            ``(rows, hidden)``
        """
        mask = batch["attention_mask"].to(self.device)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return self._features_at(last, batch, trunk, first_block)

    def _features_at(
        self, positions: Tensor, batch: Mapping[str, Tensor], trunk: Tensor | None, first_block: int
    ) -> Tensor:
        self._restrict(positions)
        try:
            hidden = self._run(self._inputs(batch), trunk, first_block)
        finally:
            # backward runs checkpointed blocks again, under whatever is bound then
            if not recomputes((self.body, *self.blocks)):
                self._restrict(None)
        return hidden[torch.arange(len(hidden), device=hidden.device), positions]

    @torch.no_grad()
    def trunk(self, batch: Mapping[str, Tensor], first_block: int) -> Tensor:
        """Input of block ``first_block``: what every draw shares when no block below it is adapted.

        A bound draw plays no part, whichever model bound it.

        Args:
            batch: see `hidden_states`.
            first_block: index of the lowest adapted block; the number of blocks where none is, for the last one's output.

        Shape:
            ``(rows, tokens, hidden)``
        """
        caught = Catch()
        with self._unbound(), self._swapped(range(first_block, len(self.blocks)), caught):
            if first_block < len(self.blocks):
                self.body(**self._inputs(batch))
            else:
                with self._observed(self.blocks[-1], lambda output: caught(_hidden(output))):
                    self.body(**self._inputs(batch))
        return caught.first

    @contextmanager
    def _unbound(self) -> Iterator[None]:
        bound = self._deltas, self._gates, self._by_position
        self.release()
        try:
            yield
        finally:
            self._deltas, self._gates, self._by_position = bound

    def label_weight(self, label_ids: Tensor | None = None) -> Tensor:
        """Rows of the output embedding: all of them, or those of the label tokens.

        Shape:
            ``(labels, hidden)``
        """
        weight = self.network.get_output_embeddings().weight
        return weight if label_ids is None else weight[label_ids.to(weight.device)]

    def finish_logits(self, logits: Tensor) -> Tensor:
        """What the architecture does to its logits after the output embedding (scaling, soft cap), elementwise."""
        config = self.network.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        mask = batch["attention_mask"].to(self.device)
        positions = batch.get("position_ids")
        if positions is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        segments = batch.get("segment_ids")
        if segments is not None and not self._takes_positions:
            raise ValueError(
                f"{type(self.body).__name__} takes no position_ids, so options cannot share a prompt in it. "
                "Use a task with label words or letters, or another backbone."
            )
        inputs = {
            "input_ids": batch["input_ids"].to(self.device),
            "attention_mask": mask if segments is None else self._segment_mask(segments.to(self.device)),
            "use_cache": False,
        }
        return inputs | ({"position_ids": positions.to(self.device)} if self._takes_positions else {})

    def _segment_mask(self, segments: Tensor) -> Tensor:
        """Additive mask by which options see the prompt (segment 1) and themselves, never each other.

        Shape:
            ``(rows, 1, tokens, tokens)`` from ``(rows, tokens)``; segment 0 is padding.
        """
        query, key = segments[:, :, None], segments[:, None, :]
        tokens = segments.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=segments.device).tril()
        seen = causal & ((key == 1) | (key == query)) & (key > 0)
        # a padding row that sees nothing at all would be a softmax over nothing: let it see itself
        seen |= torch.eye(tokens, dtype=torch.bool, device=segments.device)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=segments.device)
        return mask.masked_fill(~seen, torch.finfo(self.dtype).min)[:, None]

    @contextmanager
    def _swapped(self, indices: range, stand_in: nn.Module) -> Iterator[None]:
        kept = {index: self.blocks[index] for index in indices}
        in_tuple = self._blocks_return_tuples
        try:
            for index in indices:
                self.blocks[index] = Passing(stand_in, in_tuple)
            yield
        finally:
            for index, block in kept.items():
                self.blocks[index] = block


def _hidden(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple) else output
