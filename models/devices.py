"""Which device a user means, and whether this machine has it."""

import torch

# of torch's many types, those that a user of a plain machine names
USUAL = ("cpu", "cuda", "cuda:0", "mps")


def as_device(device: torch.device | str | int) -> torch.device:
    """The device that a user means, if this machine can compute on it: ``as_device("cuda:0")``.

    Args:
        device: a device, its name, or the number of an accelerator.

    Raises:
        ValueError: no name of a device, or a device that this machine lacks.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"Unknown device {device!r}; expected one such as {', '.join(USUAL)}. An NVIDIA GPU is 'cuda'."
        ) from error
    try:
        # torch says in many ways that a driver, a build or a device is missing, and where it is used at the latest
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"The device {str(found)!r} cannot be used on this machine: {reason}. Use 'cpu'.") from error
    return found
