"""torch's global random state, borrowed and given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Draw as from a seed, and leave the user's random state as it was.

    Usage: ``with seeded(0, model.backbone.device): noise = torch.randn(3)``.

    Args:
        seed: what to seed with.
        device: where numbers are drawn besides the CPU.
    """
    device = torch.device(device)
    on_accelerator = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_accelerator else []):
        # torch.manual_seed would reseed every accelerator, and those that were not forked would keep it
        torch.default_generator.manual_seed(seed)
        if on_accelerator:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
