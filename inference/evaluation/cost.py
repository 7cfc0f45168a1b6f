"""What a fit costs: wall time and peak memory of a block of code."""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

SAMPLING_SECONDS = 0.02


@dataclass
class Cost:
    """Wall time and peak memory.

    ``Cost(seconds=41.3, peak_memory_bytes=1_900_000_000)``

    Attributes:
        seconds: wall time; NaN until the measured block has ended.
        peak_memory_bytes: most memory held at once; 0 until the measured block has ended.
    """

    seconds: float = math.nan
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON, with None for a time that is not known."""
        return {
            "seconds": None if math.isnan(self.seconds) else self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Cost":
        """Read what `to_dict` returned."""
        return cls(math.nan if saved["seconds"] is None else saved["seconds"], saved["peak_memory_bytes"])


@contextmanager
def measure_cost(device: torch.device | str | None = None) -> Iterator[Cost]:
    """Measure the block under ``with``; the object is filled when the block ends, also by an exception.

    ``with measure_cost() as cost: posterior = engine.fit(model, data)``

    On the CPU the peak is the resident memory of this process, backbone and interpreter included and child
    processes
    excluded, sampled every 20 ms: a shorter spike may be missed. On CUDA it is the peak that torch's
    allocator reports, whose counter is reset at the start.

    Args:
        device: where the work runs; None means the CPU.

    Yields:
        A `Cost`, with wall seconds and bytes.

    Raises:
        ValueError: a device whose memory cannot be measured.
    """
    where = torch.device("cpu" if device is None else device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(where)!r}, expected 'cpu' or 'cuda'. Measure on the CPU with device=None.")
    cost = Cost()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        start = time.perf_counter()
        try:
            yield cost
        finally:
            torch.cuda.synchronize(where)
            cost.seconds = time.perf_counter() - start
            cost.peak_memory_bytes = torch.cuda.max_memory_allocated(where)
        return
    sampler = _ResidentMemory()
    start = time.perf_counter()
    sampler.start()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_memory_bytes = sampler.stop()


class _ResidentMemory(threading.Thread):
    """Watches the process until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(name="pyrolora-resident-memory", daemon=True)
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._ended.wait(SAMPLING_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._ended.set()
        self.join()
        # a block shorter than one sampling step still counts
        return max(self._peak, self._process.memory_info().rss)
