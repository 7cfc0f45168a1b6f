"""A folder with everything that a recommendation task needs: windows, titles, item embeddings and states."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyrolora.models.atomic import replacing_folder
from pyrolora.models.recommendation.interactions import Interactions
from pyrolora.models.recommendation.sasrec import SASRec, fit_sasrec
from pyrolora.models.recommendation.windows import CANDIDATES, HISTORY, Window, long_enough, windows_of
from pyrolora.models.settings import check_numbers

logger = logging.getLogger(__name__)

ITEMS, VECTORS, ENCODER, SETTINGS = "items.json", "vectors.safetensors", "sasrec.safetensors", "preparation.json"
# the encoder's item embeddings, among the vectors and among the tables of a task
ITEM_TABLE = "items"


@dataclass(frozen=True)
class Preparation:
    """How interactions become windows; `prepare` does it.

    Usage::

        Preparation(train_windows=5000).prepare(read_interactions("movielens-100k"), "runs/movielens")
        task("next_item", data_dir="runs/movielens")

    Users are divided, never windows: no user of validation, test or unusual is seen by the encoder or in training.
    ``unusual`` holds the users whose items are rarest among all users' (mean of ``-log`` popularity): foreigners for
    questions of uncertainty. The other three parts share the rest by a hash of the user.

    Args:
        history: items of a window.
        shortest: see `windows_of`.
        candidates: see `windows_of`.
        held_out: share of users in each of validation and test.
        unusual: share of users set apart as unusual.
        train_windows: training windows that are kept, chosen by a hash; None for all.
        features: width of the encoder's embeddings and states.
        epochs: of the encoder, see `fit_sasrec`.
        seed: of division, candidates, encoder and control vectors.

    Raises:
        ValueError: a share or a number out of range.
    """

    history: int = HISTORY
    shortest: int | None = None
    candidates: int = CANDIDATES
    held_out: float = 0.1
    unusual: float = 0.1
    train_windows: int | None = 20_000
    features: int = 64
    epochs: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.epochs < 1:
            raise ValueError(
                f"The encoder needs at least 1 epoch to learn anything; got {self.epochs}. The default is 30."
            )
        if not (self.held_out > 0 and self.unusual >= 0 and 2 * self.held_out + self.unusual < 1):
            raise ValueError(
                f"held_out={self.held_out} and unusual={self.unusual} leave nobody to train on, or nobody to judge on; "
                "expected shares with 2 held_out + unusual below 1, such as 0.1 and 0.1."
            )
        if self.train_windows is not None and self.train_windows < 1:
            raise ValueError(f"train_windows must be at least 1, or None for all; got {self.train_windows}.")

    def divide(self, interactions: Interactions) -> dict[str, list[str]]:
        """Users of each part.

        Raises:
            ValueError: too few users with enough items for four parts.
        """
        users = long_enough(interactions, self.history if self.shortest is None else self.shortest)
        short = len(interactions.of_user) - len(users)
        if short:
            logger.info("%d of %d users have too few items for one window", short, len(interactions.of_user))
        if len(users) < 10:
            raise ValueError(
                f"Only {len(users)} users have enough items for a window of {self.history} and a next one; at least 10 are "
                "needed. Give more interactions, or a smaller history or shortest."
            )
        taken = Counter(item for items in interactions.of_user.values() for item in items.tolist())
        total = taken.total()
        rarity = {
            user: -np.mean([np.log(taken[i] / total) for i in interactions.of_user[user].tolist()]) for user in users
        }
        apart = max(1, round(self.unusual * len(users))) if self.unusual else 0
        unusual = sorted(users, key=lambda user: (-rarity[user], user))[:apart]
        rest = sorted(set(users) - set(unusual), key=lambda user: _digest(self.seed, user))
        held = max(1, round(self.held_out * len(users)))
        return {"train": rest[2 * held :], "validation": rest[held : 2 * held], "test": rest[:held], "unusual": unusual}

    def prepare(
        self,
        interactions: Interactions,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> Path:
        """Write the folder, whole or not at all; an earlier one made by this function is replaced.

        It holds ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``unusual.jsonl`` with a window a line,
        ``items.json`` with names and titles, ``vectors.safetensors`` with item embeddings and each window's state,
        ``sasrec.safetensors`` and ``preparation.json``.

        Args:
            interactions: who took what.
            folder: where; parents are made.
            device: where the encoder is trained.
            progress: show bars.

        Raises:
            FileExistsError: the place holds something else.
            ValueError: too few users or items; see `divide` and `windows_of`.
        """
        check_place(folder)
        users = self.divide(interactions)
        windows = {part: self._windows(interactions, part, members) for part, members in users.items() if members}
        encoder = fit_sasrec(
            [interactions.of_user[user].tolist() for user in users["train"]],
            len(interactions.titles),
            features=self.features,
            length=self.history,
            epochs=self.epochs,
            device=device,
            seed=self.seed,
            progress=progress,
        )
        states = {part: encoder.states([window.history for window in made]) for part, made in windows.items()}
        items = encoder.item_embeddings.weight[:-1].detach()
        return write_windows(folder, interactions, windows, states, items, asdict(self), encoder)

    def _windows(self, interactions: Interactions, part: str, users: list[str]) -> list[Window]:
        made = windows_of(
            interactions,
            users,
            history=self.history,
            shortest=self.shortest,
            candidates=self.candidates,
            seed=self.seed,
        )
        if part != "train" or self.train_windows is None or len(made) <= self.train_windows:
            return made
        return sorted(made, key=lambda window: _digest(self.seed, f"{window.user}/{window.position}"))[
            : self.train_windows
        ]


def write_windows(
    folder: str | Path,
    interactions: Interactions,
    windows: Mapping[str, Sequence[Window]],
    states: Mapping[str, Tensor],
    items: Tensor,
    settings: Mapping[str, Any],
    encoder: SASRec | None = None,
) -> Path:
    """Write a folder that next-item tasks read, whole or not at all; `Preparation.prepare` says what it holds.

    Args:
        folder: where; parents are made.
        interactions: for names and titles of the items.
        windows: part -> its windows.
        states: part -> what gates read of each window.
        items: an embedding for each item.
        settings: how it was made; ``seed`` decides the control vectors.
        encoder: what made the states.

    Raises:
        FileExistsError: the place holds something else.

    Shape:
        states ``(windows, features)``, items ``(items, features)``
    """
    folder = check_place(folder)
    vectors = {ITEM_TABLE: items}
    for part, made in windows.items():
        vectors[f"{part}/sequence"] = states[part]
        vectors[f"{part}/random_sequence"] = _noise(made, states[part].shape[-1], int(settings.get("seed", 0)))
    with replacing_folder(folder) as partial:
        names = {"names": interactions.item_names, "titles": interactions.titles}
        (partial / ITEMS).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
        for part, made in windows.items():
            lines = (json.dumps(_as_row(window)) for window in made)
            (partial / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in vectors.items()}, partial / VECTORS)
        if encoder is not None:
            encoder.save(partial / ENCODER)
        counts = {part: len(made) for part, made in windows.items()}
        (partial / SETTINGS).write_text(json.dumps({**settings, "windows": counts}, indent=2))
    return folder


def check_place(folder: str | Path) -> Path:
    """Refuse a place that holds anything but prepared windows: replacing it would delete what is there.

    Raises:
        FileExistsError: a file, or a folder that holds something else.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and ((folder / SETTINGS).is_file() or not any(folder.iterdir()))):
        raise FileExistsError(f"{str(folder)!r} exists and holds no prepared windows. Choose a new or an empty folder.")
    return folder


def read_windows(folder: str | Path, part: str) -> list[Window]:
    """Windows of a part of a prepared folder: ``read_windows("runs/movielens", "train")``."""
    rows = (json.loads(line) for line in (Path(folder) / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Window(
            row["user"],
            int(row["id"].rsplit("/", 1)[-1]),
            tuple(row["history"]),
            row["candidates"][row["label"]],
            tuple(row["candidates"]),
        )
        for row in rows
    ]


def _as_row(window: Window) -> dict[str, object]:
    return {
        "id": f"{window.user}/{window.position}",
        "user": window.user,
        "history": list(window.history),
        "candidates": list(window.candidates),
        "label": window.label,
    }


def _noise(windows: Sequence[Window], features: int, seed: int) -> Tensor:
    """A standard Normal vector for each window, the same whatever other windows there are."""
    rows = []
    for window in windows:
        digest = hashlib.sha256(f"{seed}\x1fnoise\x1f{window.user}\x1f{window.position}".encode()).digest()
        rows.append(
            np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(features, dtype=np.float32)
        )
    return torch.from_numpy(np.stack(rows))


def _digest(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).hexdigest()
