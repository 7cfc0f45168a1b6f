"""Wall time of work that a device may still be doing when the call returns."""

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronise(device: torch.device | str) -> None:
    """Wait until a device has done what it was given; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device | str) -> float:
    """Wall seconds from an idle device to an idle device: ``seconds_of(step, "cuda")``."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start
