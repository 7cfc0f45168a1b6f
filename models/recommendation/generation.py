"""Answers that a network writes by itself, and whether they name a candidate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split


@dataclass(frozen=True)
class GenerationCounts:
    """What became of generated answers.

    An answer is valid if exactly one candidate's text occurs in it; of two candidates of which one holds the other's text
    ("Alien", "Aliens"), the longer one's answer holds both and counts as invalid.

    Attributes:
        total: answers.
        valid: valid answers.
        correct: valid answers that name the target.
    """

    total: int
    valid: int
    correct: int

    @property
    def valid_ratio(self) -> float:
        """Valid answers among all."""
        return self.valid / self.total

    @property
    def hit_rate_of_valid(self) -> float:
        """HR@1 as correct over valid answers, which a network that rarely answers can make high; NaN without any."""
        return self.correct / self.valid if self.valid else float("nan")

    @property
    def hit_rate(self) -> float:
        """HR@1 as correct over all answers."""
        return self.correct / self.total


def count_answers(
    answers: Sequence[str], candidates: Sequence[Sequence[str]], targets: Sequence[int]
) -> GenerationCounts:
    """Judge generated answers: ``count_answers(["Alien (1979)"], [["Alien (1979)", "Brazil (1985)"]], [0]).hit_rate``.

    Source: Liao et al., "LLaRA", 2024, section 4.1 (HitRatio@1 and ValidRatio).

    Args:
        answers: generated texts.
        candidates: the texts among which each was to choose.
        targets: place of the right one.

    Raises:
        ValueError: other numbers of answers, candidates and targets, or none at all.
    """
    if not len(answers) == len(candidates) == len(targets) or not answers:
        raise ValueError(
            f"{len(answers)} answers, {len(candidates)} lists of candidates and {len(targets)} targets; expected one each."
        )
    valid = correct = 0
    for answer, texts, target in zip(answers, candidates, targets, strict=True):
        named = [place for place, text in enumerate(texts) if text.casefold() in answer.casefold()]
        valid += len(named) == 1
        correct += named == [target]
    return GenerationCounts(len(answers), valid, correct)


@torch.no_grad()
def generate_answers(
    model: BayesianModel,
    data: Split,
    draw: Mapping[str, Tensor],
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """What a network writes after each prompt under one draw, without sampling: one line for each example.

    Usage: ``count_answers(generate_answers(model, split, posterior.mean()), [e.options for e in split], labels)``.

    Strings of several draws cannot be averaged; probabilities can, see `Posterior.predict`.

    Args:
        model: the model, of a task that scores options.
        data: the examples.
        draw: site name -> value of the site's shape.
        max_new_tokens: longest answer.
        num_beams: beams of the search; every beam of a row has the row's own gate.
        batch_size: rows at once.
        progress: show a bar.

    Raises:
        ValueError: a gate that is summed out, for which there is no one network to write an answer.
    """
    encoded = model.encode(data)
    tokenizer, network = model.backbone.tokenizer, model.backbone.network
    answers = [""] * len(encoded)
    total = encoded.steps_per_epoch(batch_size)
    try:
        for whole in tqdm(encoded.batches(batch_size), total=total, desc="answers", disable=not progress, leave=False):
            batch = _prompts(encoded, whole)
            inputs = {key: batch[key].to(model.backbone.device) for key in ("input_ids", "attention_mask")}
            model.bind(batch, draw)
            written = network.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=encoded.pad_id,
            )
            texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for place, text in zip(whole["index"].tolist(), texts, strict=True):
                answers[place] = text.strip().split("\n")[0]
    finally:
        model.release()
    return answers


def _prompts(encoded: EncodedSplit, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without options, padded on the left as a decoder needs it."""
    rows = [encoded.rows[place] for place in batch["index"].tolist()]
    lengths = [row.segment_ids.count(1) if row.segment_ids else len(row) for row in rows]
    width = max(lengths)

    def padded(name: str, fill: int) -> Tensor:
        entries = [getattr(row, name)[:length] for row, length in zip(rows, lengths, strict=True)]
        return torch.tensor([[fill] * (width - len(entry)) + list(entry) for entry in entries])

    cut = {**batch, "input_ids": padded("input_ids", encoded.pad_id)}
    cut["attention_mask"] = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    if "items" in batch:
        cut["items"] = padded("items", -1)
    return {key: value for key, value in cut.items() if key not in ("segment_ids", "position_ids", "scored", "trunk")}
