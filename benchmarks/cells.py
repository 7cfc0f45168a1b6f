"""Results of a benchmark, one file a cell, that any number of processes may fill together."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from pyrolora.inference.evaluation.aggregate import mean_over_seeds
from pyrolora.inference.evaluation.bootstrap import Interval
from pyrolora.models.atomic import replacing

logger = logging.getLogger(__name__)

# seconds between looks at cells that another process is computing
POLL_SECONDS = 0.5


class Cells:
    """Cells of a benchmark in one folder.

    Usage::

        cells = Cells("runs/curves")
        found = cells.computed([{"adapter": "LoRA()", "seed": 0}, {"adapter": "LoRA()", "seed": 1}], measure)

    A cell's identity holds everything that decides its result, so that a folder never gives back what was measured under
    other settings. A process that dies loses its claim, and the next one computes the cell again.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, identity: Mapping[str, Any]) -> Path:
        """The file of a cell."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{digest}.json"

    def result(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a finished cell found, or None."""
        path = self.path(identity)
        return json.loads(path.read_text())["found"] if path.is_file() else None

    def computed(
        self, identities: list[dict[str, Any]], compute: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Results of all cells in their order: those on disk, those computed here, and those that others compute meanwhile.

        Args:
            identities: what is to be computed, ready for JSON.
            compute: from an identity to what a table needs of it, ready for JSON.
        """
        pending = [identity for identity in identities if self.result(identity) is None]
        self.folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(identities), initial=len(identities) - len(pending), desc=self.folder.name) as bar:
            while pending:
                before = len(pending)
                for identity in list(pending):
                    path = self.path(identity)
                    try:
                        with FileLock(path.with_suffix(".lock"), blocking=False):
                            if self.result(identity) is None:
                                logger.info("%s", identity)
                                found = compute(identity)
                                with replacing(path) as partial:
                                    partial.write_text(json.dumps({"cell": identity, "found": found}))
                    except Timeout:
                        continue
                    pending.remove(identity)
                    bar.update()
                if len(pending) == before:
                    time.sleep(POLL_SECONDS)
        return [json.loads(self.path(identity).read_text())["found"] for identity in identities]


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Mean with Student's t-interval across seeds, as a table shows it; one seed stands for itself."""
    found = list(values)
    interval = mean_over_seeds(Interval(value, value, value) for value in found)
    ends = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if len(found) > 1 else ""
    return f"{interval.value:.{digits}f}{ends}"
