"""In which float type, and with which attention, a frozen network runs best on a device."""

import torch

from pyrolora.models.naming import nearest


def native_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The fastest safe type for a frozen backbone: ``native_dtype("cpu")``.

    bfloat16 where the device multiplies it in hardware (it keeps float32's range), else float32.

    Args:
        device: where the backbone will run.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
    return torch.float32


def as_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    """The floating type that a user means: ``as_dtype("auto", "cuda")``.

    Args:
        dtype: a type, its name, or ``"auto"`` for `native_dtype`.
        device: where it will be used.

    Raises:
        ValueError: an unknown name (the nearest is offered), or a type that is not of floating point.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} is not of floating point; use torch.float32 or torch.bfloat16.")
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}
    if not isinstance(dtype, str):
        raise ValueError(
            f"dtype is {dtype!r}, a {type(dtype).__name__}; expected a torch.dtype, 'auto' or one of {', '.join(named)}."
        )
    if dtype == "auto":
        return native_dtype(device)
    if dtype not in named:
        raise ValueError(
            f"Unknown dtype {dtype!r}; expected 'auto' or one of {', '.join(named)}. "
            f"Did you mean {nearest(dtype, named)!r}?"
        )
    return named[dtype]


def attention_of(dtype: torch.dtype, device: torch.device) -> str:
    """Which of the network's attention implementations to run.

    On a CPU torch's fused attention is slow in bfloat16 for short rows: forward and backward of 16 rows of 13 tokens took
    6.4 ms against 0.9 ms in plain matrix products, 4 rows of 100 tokens 8.9 against 2.2; from about 400 tokens on it wins.
    """
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
