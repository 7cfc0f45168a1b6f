"""Windows of a user's history with the item that came next, and candidates among which it is to be found."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pyrolora.models.recommendation.interactions import Interactions

HISTORY, CANDIDATES = 10, 20


@dataclass(frozen=True)
class Window:
    """Items that a user took one after the other, and what came next.

    Attributes:
        user: the user.
        position: place of the target among all the user's items.
        history: numbers of the items before it, earliest first.
        target: number of the next item.
        candidates: numbers of items that hold the target exactly once, and nothing that the user took before.
    """

    user: str
    position: int
    history: tuple[int, ...]
    target: int
    candidates: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.candidates.count(self.target) != 1:
            raise ValueError(
                f"The candidates of user {self.user!r} hold the target {self.candidates.count(self.target)} times, expected "
                f"once: a prediction among {self.candidates} could not be right, or twice."
            )
        if taken := sorted(set(self.candidates) & set(self.history)):
            raise ValueError(f"The candidates of user {self.user!r} hold items of the history: {taken}. Take others.")

    @property
    def label(self) -> int:
        """Place of the target among the candidates."""
        return self.candidates.index(self.target)


def windows_of(
    interactions: Interactions,
    users: Iterable[str],
    *,
    history: int = HISTORY,
    shortest: int | None = None,
    candidates: int = CANDIDATES,
    last_only: bool = False,
    seed: int = 0,
) -> list[Window]:
    """All windows of some users: ``windows_of(interactions, ["196", "186"])``.

    The rule of the released MovieLens windows, whose 95 test rows it reproduces: items by time, the last one as target, the
    ten before it with nothing skipped. There only the last window of a user is a test row (``last_only``).

    Args:
        interactions: who took what.
        users: whose windows.
        history: items of a window.
        shortest: windows with fewer items before the target are left out; by default only full ones are made.
        candidates: the target and this many items less one that the user had not taken, drawn anew for each window. Each
            window's draw depends on seed, user and position alone, so it stays whatever other windows are made.
        last_only: only each user's last window.
        seed: of the candidates.

    Raises:
        ValueError: an unknown user, a user with too few items for one window, or fewer items than candidates.
    """
    shortest = history if shortest is None else shortest
    if not 1 <= shortest <= history or candidates < 2:
        raise ValueError(
            f"history={history}, shortest={shortest}, candidates={candidates}: expected 1 <= shortest <= history, and two "
            "candidates or more."
        )
    made = []
    for user in users:
        items = _items_of(interactions, user)
        if len(items) <= shortest:
            raise ValueError(
                f"User {user!r} has {len(items)} items, and a window takes {shortest} and a next one. Leave the user out, or "
                f"give a smaller history or shortest."
            )
        first = len(items) - 1 if last_only else shortest
        for position in range(first, len(items)):
            past, target = items[:position], items[position]
            # an item taken twice is no new one, and must not be a candidate that stands in the history
            if target in past:
                continue
            chosen = _candidates(interactions, user, position, past, target, candidates, seed)
            made.append(Window(user, position, tuple(past[-history:]), target, chosen))
    return made


def long_enough(interactions: Interactions, items: int = HISTORY) -> list[str]:
    """Users with more than so many items, in the order of the source."""
    return [user for user, taken in interactions.of_user.items() if len(taken) > items]


def _items_of(interactions: Interactions, user: str) -> list[int]:
    if user not in interactions.of_user:
        raise ValueError(f"There is no user {user!r} among the {len(interactions.of_user)} of the interactions.")
    return interactions.of_user[user].tolist()


def _candidates(
    interactions: Interactions, user: str, position: int, past: Sequence[int], target: int, count: int, seed: int
) -> tuple[int, ...]:
    digest = hashlib.sha256(f"{seed}\x1f{user}\x1f{position}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    taken = set(past) | {target}
    # two items of one title could not be told apart in a prompt
    titles = {interactions.titles[item] for item in taken}
    chosen = [target]
    for item in random.permutation(len(interactions.titles)).tolist():
        if len(chosen) == count:
            break
        if item not in taken and interactions.titles[item] not in titles:
            titles.add(interactions.titles[item])
            chosen.append(item)
    if len(chosen) < count:
        raise ValueError(
            f"{count} candidates were asked for user {user!r}, and only {len(chosen) - 1} items are new to them beside the "
            "target. Ask for fewer candidates."
        )
    return tuple(chosen[place] for place in random.permutation(count).tolist())
