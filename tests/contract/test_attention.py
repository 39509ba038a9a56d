"""Every attention backend either says why it does not work here or agrees with float32 arithmetic."""

from __future__ import annotations

import pytest
import torch

from kinema.errors import MachineError, RequestError
from kinema.models.layers import sdpa
from kinema.runtime import attention as backends
from kinema.runtime.attention import BACKENDS, Backend, attention, available, relative_error

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_works_or_says_why(name: str, device: str):
    reason = available(device)[name]
    if reason is None:
        error = relative_error(attention(name, device), torch.device(device), torch.bfloat16)
        assert error <= BACKENDS[name].tolerance
    else:
        with pytest.raises(MachineError, match=name) as caught:
            attention(name, device)
        assert reason in str(caught.value)


def test_sdpa_is_always_there_and_exact_in_float32():
    assert available()["sdpa"] is None
    assert relative_error(attention("sdpa"), torch.device("cpu"), torch.float32) < 1e-6


def unscaled(q, k, v):
    return sdpa(q * q.shape[-1] ** 0.5, k, v)


def no_tail(q, k, v):
    return sdpa(q, k[:, :, :320], v[:, :, :320])


def four_bits(q, k, v):
    step = k.abs().amax() / 7
    return sdpa(q, (k / step).round() * step, v)


def nan(q, k, v):
    return sdpa(q, k, v) * float("nan")


@pytest.mark.parametrize("fault", [unscaled, no_tail, four_bits, nan])
def test_self_test_catches(fault, monkeypatch):
    loose = max(backend.tolerance for backend in BACKENDS.values())
    monkeypatch.setitem(backends.BACKENDS, "faulty", Backend(lambda: fault, loose))
    assert "off by" in available()["faulty"]
    with pytest.raises(MachineError, match="off by"):
        attention("faulty")


def test_unknown_name_lists_the_known():
    with pytest.raises(RequestError, match=r"flash_atn.*sdpa, flash, sage"):
        attention("flash_atn")


def test_a_core_refuses_a_dtype_it_would_have_to_cast(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "half", Backend(lambda: sdpa, 0.01, dtypes=(torch.bfloat16,)))
    core = attention("half")
    x = torch.ones(1, 1, 4, 128)
    with pytest.raises(RequestError, match="bfloat16, not float32"):
        core(x, x, x)
    assert core(x.bfloat16(), x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
