"""Results of a benchmark, one file each: kept, never computed twice, shared by any number of processes."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from pyrolora.inference.evaluation.aggregate import mean_over_seeds
from pyrolora.inference.evaluation.bootstrap import Interval
from pyrolora.models.atomic import replacing

# seconds between looks at cells that another process is computing
POLL_SECONDS = 2.0


def finish(cells: Mapping[Path, Callable[[], Any]], *, wait: bool = True) -> dict[Path, Any]:
    """The results of all cells, those that are missing computed here or by another process on the same folder.

    A process that dies loses its claim on a cell, and whoever comes next computes it.

    Args:
        cells: file that the result is kept in, as JSON -> what computes it.
        wait: whether to wait for cells that other processes hold; without, only what is there is returned.
    """
    pending = [path for path in cells if not path.is_file()]
    with tqdm(total=len(cells), initial=len(cells) - len(pending), desc="cells") as bar:
        while pending:
            before = len(pending)
            for path in list(pending):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(path.with_suffix(".lock"), blocking=False):
                        if not path.is_file():
                            result = cells[path]()
                            with replacing(path) as partial:
                                partial.write_text(json.dumps(result))
                except Timeout:
                    continue
                pending.remove(path)
                bar.update()
            if len(pending) == before:
                if not wait:
                    break
                time.sleep(POLL_SECONDS)
    return {path: json.loads(path.read_text()) for path in cells if path.is_file()}


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Mean with Student's t-interval across seeds, as a table shows it; one seed stands for itself."""
    found = list(values)
    interval = mean_over_seeds(Interval(value, value, value) for value in found)
    ends = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if len(found) > 1 else ""
    return f"{interval.value:.{digits}f}{ends}"
