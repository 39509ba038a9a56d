"""Attention backends: the cores that `WanDiT.attention` may be swapped for, and whether each works here.

A row is offered only if its package imports and its result on this device agrees with float32 arithmetic. Knows
nothing of models.

Left out after measurement: matmul and softmax in chunks, head by head. On a CPU with AMX it lost to torch's SDPA at
1280 and 4096 tokens, by 1.1 times in float32 and 1.3 to 2 times in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.errors import MachineError, RequestError
from kinema.models.layers import Attention, sdpa


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    load       returns the core; raises ImportError where its package is missing.
    tolerance  largest root-mean-square error, relative to the result, that the self-test accepts.
    devices    device types it runs on; empty for all.
    dtypes     dtypes it takes; empty for all. The self-test runs in bfloat16.
    """

    load: Callable[[], Attention]
    tolerance: float
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


def _load_flash() -> Attention:
    from flash_attn import flash_attn_func

    def flash(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        y_BLNK: Tensor = flash_attn_func(q_BNLK.transpose(1, 2), k_BNLK.transpose(1, 2), v_BNLK.transpose(1, 2))
        return y_BLNK.transpose(1, 2)

    return flash


def _load_sage() -> Attention:
    from sageattention import sageattn

    def sage(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        y_BNLK: Tensor = sageattn(q_BNLK, k_BNLK, v_BNLK, tensor_layout="HND", is_causal=False)
        return y_BNLK

    return sage


def attention(name: str, device: str | torch.device = "cpu") -> Attention:
    """Return the attention core `name`, tested on `device`.

    The core raises RequestError for a dtype it cannot take: it never casts in silence.
    Raises RequestError for an unknown name, MachineError where the backend does not work here, with the reason.
    """
    if name not in BACKENDS:
        raise RequestError(
            f"attention {name!r} is unknown; there are {', '.join(BACKENDS)}",
            "leave it out for sdpa",
            field="attention",
            got=name,
            allowed=list(BACKENDS),
        )
    reason = why_not(name, device)
    if reason is not None:
        raise MachineError(f"attention {name} does not work on {device}: {reason}", "use sdpa", need=name, fits="sdpa")
    return _checked(name, BACKENDS[name])


def available(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Return for each backend None if it works on `device`, else the reason why not."""
    return {name: why_not(name, device) for name in BACKENDS}


def why_not(name: str, device: str | torch.device) -> str | None:
    """Return None if backend `name` imports, runs on `device` and agrees with float32, else the reason."""
    backend = BACKENDS[name]
    kind = torch.device(device).type
    if backend.devices and kind not in backend.devices:
        return f"needs {' or '.join(backend.devices)}"
    try:
        core = backend.load()
    except (ImportError, OSError) as error:
        return f"its package does not import: {error}"
    try:
        error_rms = relative_error(core, torch.device(device), torch.bfloat16)
    except Exception as error:  # a compiled kernel may refuse this card in any way it likes
        return f"its self-test failed: {error}"
    if not error_rms <= backend.tolerance:  # not <=, so that NaN fails
        return f"its result is off by {error_rms:.1%} (root mean square), allowed {backend.tolerance:.1%}"
    return None


def relative_error(core: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """Return the root-mean-square error of `core` over that of the result, against float32 arithmetic on the CPU.

    200 queries on 333 keys, 3 heads: no multiple of a tile, so that an unmasked tail shows.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 200, 128), (1, 3, 333, 128), (1, 3, 333, 128))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    q = q * 3  # gives attention peaks to find: an even average of all values would hide errors
    weights = torch.softmax(q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    want = weights @ v.float()
    got = core(q.to(device), k.to(device), v.to(device)).float().cpu()
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def _checked(name: str, backend: Backend) -> Attention:
    core = backend.load()
    if not backend.dtypes:
        return core

    def checked(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        if q_BNLK.dtype not in backend.dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
            raise RequestError(
                f"attention {name} takes {allowed}, not {str(q_BNLK.dtype).removeprefix('torch.')}",
                "use sdpa, or precision fast",
                field="attention",
                got=name,
                allowed=["sdpa"],
            )
        return core(q_BNLK, k_BNLK, v_BNLK)

    return checked


HALVES = (torch.bfloat16, torch.float16)

BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(lambda: sdpa, tolerance=0.01),
    "flash": Backend(_load_flash, tolerance=0.01, devices=("cuda",), dtypes=HALVES),
    "sage": Backend(_load_sage, tolerance=0.05, devices=("cuda",), dtypes=HALVES),
}
