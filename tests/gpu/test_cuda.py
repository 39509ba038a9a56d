"""What the CPU suite holds, on a CUDA device: run with `pytest -m gpu tests/gpu` where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from golden_weights import assert_golden, golden
from kinema.engine import Engine
from kinema.runtime.attention import available
from kinema.schema import Request, Result
from parity.test_e2e import NAMES, TOLERANCE, run
from tiny_world import TinyWorld

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """TF32 would take reference precision away."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_run_on_cuda_equals_the_official_pipeline(name: str) -> None:
    spec, want = golden(name)
    latents, _ = run(spec, device=torch.device("cuda"))
    assert_golden(latents[0].cpu(), want["latent"], TOLERANCE)


@pytest.mark.parametrize(
    ("model", "fields"),
    [("tiny-t2v", {}), ("tiny-t2v-two", {}), ("tiny-t2v", {"motion_bucket_id": 70}),
     ("tiny-camera22-two", {"camera": "pan left, roll"}), ("tiny-vace-two", {})],
)  # fmt: skip
def test_a_seed_means_the_same_on_cuda_and_cpu(
    tiny_world: TinyWorld, tmp_path: Path, model: str, fields: dict[str, Any]
) -> None:
    latents = {}
    with Engine(tiny_world.settings) as engine:
        for device in ("cpu", "cuda"):
            save = tmp_path / f"{device}.latents.safetensors"
            request = Request(
                model=model, prompt="a cat walks", seed=3, save=save, precision="reference", device=device, **fields
            )
            assert any(isinstance(event, Result) for event in engine.run(engine.plan(request)))
            latents[device] = load_file(save)["latents"]
    assert_golden(latents["cuda"], latents["cpu"], TOLERANCE)


def test_some_attention_backend_is_available() -> None:
    assert available("cuda")["sdpa"] is None
