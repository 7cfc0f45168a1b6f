"""torch's global random state, borrowed and given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw as from a seed, and leave the user's random state as it was.

    Usage: ``with seeded(0, model.backbone.device): noise = torch.randn(3)``.

    Seeding reaches every accelerator at once, so the state of the one that draws is put back as well as the CPU's.

    Args:
        seed: what to seed with.
        device: where numbers are drawn besides the CPU.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
