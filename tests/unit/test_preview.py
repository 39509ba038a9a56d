"""Latent previews: the public factors, and the fit for another autoencoder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kinema.errors import CheckpointError, RequestError
from kinema.media.preview import LATENT_RGB, fit_preview, preview_rgb
from kinema.ops import preview_factors


def random_latents(channels: int, frames: int = 3) -> torch.Tensor:
    return torch.randn(channels, frames, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", LATENT_RGB)
def test_a_cell_becomes_a_pixel(channels: int) -> None:
    latents = random_latents(channels)
    frames = preview_rgb(latents)
    assert frames.shape == (3, 4, 6, 3)
    table = torch.tensor(LATENT_RGB[channels])
    want = (latents[:, 1, 2, 5] @ table[:-1] + table[-1] + 1) / 2
    torch.testing.assert_close(frames[1, 2, 5], want.clamp(0, 1))


def test_the_fit_finds_the_factors_that_made_the_clips() -> None:
    factors = 0.1 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    latents = [random_latents(5), random_latents(5, frames=1)]
    clips = []
    for latent in latents:
        frames = preview_rgb(latent, factors).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        clips.append(torch.cat([frames[:1], frames[1:].repeat_interleave(4, dim=0)]))
    torch.testing.assert_close(fit_preview(latents, clips), factors, atol=1e-5, rtol=0)


def test_latents_without_factors_are_refused() -> None:
    with pytest.raises(RequestError, match="no preview factors are known for 5"):
        preview_rgb(random_latents(5))
    with pytest.raises(RequestError, match="do not fit 16"):
        preview_rgb(random_latents(16), torch.zeros(16, 3))


@pytest.mark.parametrize("text", ["[[1, 2", '{"a": 1}', '[["x"]]'])
def test_broken_factors_inside_a_vae_are_named(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "vae.safetensors", metadata={"preview_rgb": text})
    plan = SimpleNamespace(vae=SimpleNamespace(files=(tmp_path / "vae.safetensors",)))
    with pytest.raises(CheckpointError, match="preview_rgb is no table of numbers"):
        preview_factors(plan)  # type: ignore[arg-type]
