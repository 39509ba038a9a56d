"""The arithmetic of activations against the tensors layers really make, tracked at published sizes without memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kinema.models.adapters import motion
from kinema.models.adapters.animate import AnimateState
from kinema.models.adapters.motion import FaceReader
from kinema.models.flux import FluxConfig, FluxDiT
from kinema.models.flux import stays_float32 as flux_stays_float32
from kinema.models.flux_vae import FluxVAE, FluxVAEConfig
from kinema.models.wan import WanConfig, WanDiT, stays_float32
from kinema.models.wan_blocks import KVCache
from kinema.models.wan_config import AnimateConfig, CameraConfig, ReferenceConfig, SpeechConfig, VaceConfig
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.planning import activations, flux_cost
from kinema.tensors import (
    CameraConditions,
    Conditions,
    FluxConditions,
    ReferenceConditions,
    SpeechConditions,
    VaceConditions,
)


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and the most there ever were. Meta tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._drop, key)
        self.peak = max(self.peak, self.now)
        return out

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def flash(q, k, v, **_):
    """What a fused kernel makes: the result, and no scores."""
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)


DITS = {"14B": (5120, 13824), "1.3B": (1536, 8960), "5B": (3072, 14336)}


@pytest.mark.parametrize(
    ("model", "dtype", "branches", "parts"),
    [("14B", "bfloat16", 1, 1), ("14B", "bfloat16", 2, 4), ("1.3B", "float32", 1, 1), ("5B", "bfloat16", 2, 1)],
)
def test_dit(model: str, dtype: str, branches: int, parts: int) -> None:
    dim, ffn_dim = DITS[model]
    frames, rows, columns = 21, 60, 104
    tokens = frames * rows * columns // 4
    with torch.inference_mode(), torch.device("meta"):
        config = WanConfig(dim=dim, ffn_dim=ffn_dim, num_layers=2, in_channels=16, out_channels=16, text_dim=512)
        dit = WanDiT(config).requires_grad_(False).eval()
        dit.attention, dit.ffn_tokens = flash, None if parts == 1 else -(-tokens // parts)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_float32(name) else getattr(torch, dtype))
        contexts = [dit.prepare(Conditions((torch.empty(40, 512),))) for _ in range(branches)]
        x, timesteps = torch.empty(1, 16, frames, rows, columns), torch.empty(1)
        with Live() as live:
            dit(x, timesteps, *contexts)
    predicted = activations.dit_bytes(
        dataclasses.asdict(config),
        tokens,
        0,
        2 if dtype == "bfloat16" else 4,
        branches=branches,
        ffn_tokens=dit.ffn_tokens,
    )
    assert predicted == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_adapters_keep(dtype: torch.dtype) -> None:
    frames, rows, columns = 3, 8, 12
    tokens = frames * rows * columns // 4
    given = {
        "vace": VaceConditions(torch.empty(1, 96, frames, rows, columns)),
        "camera": CameraConditions([torch.empty(1, 24, 8 * rows, 8 * columns)] * frames),
    }
    for name, config in (("vace", VaceConfig((0,))), ("camera", CameraConfig())):
        with torch.inference_mode(), torch.device("meta"):
            whole = WanConfig(256, 512, 2, 16, 16, text_dim=32, **{name: config})
            dit = WanDiT(whole).requires_grad_(False).eval()
            for key, parameter in dit.named_parameters():
                parameter.data = parameter.data.to(torch.float32 if stays_float32(key) else dtype)
            told = {name: given[name]}
            ((_, state),) = dit.prepare(Conditions((torch.empty(4, 32, device="meta"),), **told).to("meta")).adapters
        kept = state if isinstance(state, torch.Tensor) else state.tokens_BLD
        assert activations.adapter_bytes(dataclasses.asdict(whole), tokens, dtype.itemsize) == kept.nbytes


@pytest.mark.parametrize("branches", [1, 2])
def test_a_dit_with_a_skeleton_and_faces(branches: int) -> None:
    """The prepared skeleton stays, one for all branches; what faces add after a block is not the fullest moment."""
    frames, rows, columns = 21, 60, 104
    tokens = frames * rows * columns // 4
    with torch.inference_mode(), torch.device("meta"):
        config = WanConfig(dim=5120, ffn_dim=13824, num_layers=2, in_channels=36, out_channels=16, text_dim=512,
                           animate=AnimateConfig(interval=1))  # fmt: skip
        dit = WanDiT(config).requires_grad_(False).eval()
        dit.attention = flash
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_float32(name) else torch.bfloat16)
        (adapter,) = dit.adapters
        context = dit.prepare(Conditions((torch.empty(40, 512),), None, torch.empty(1, 20, frames, rows, columns)))
        faces = KVCache(torch.empty(1, frames, 5, 5120))
        x, timesteps = torch.empty(1, 16, frames, rows, columns), torch.empty(1)
        with Live() as live:
            skeleton = torch.empty(1, tokens * (frames - 1) // frames, 5120)
            told = dataclasses.replace(context, adapters=((adapter, AnimateState(skeleton, faces)),))
            dit(x, timesteps, *[told] * branches)
    known = dataclasses.asdict(config)
    predicted = activations.dit_bytes(known, tokens, 0, 2, branches=branches)
    predicted += activations.adapter_bytes(known, tokens, 2)
    assert predicted == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("frames", [5, 77])
def test_faces_on_their_way_through_the_motion_encoder(frames: int) -> None:
    config = AnimateConfig()
    with torch.inference_mode(), torch.device("meta"):
        reader = FaceReader(config).requires_grad_(False)
        with Live() as live:
            faces = torch.empty(frames, 3, config.face_size, config.face_size)
            reader(faces[: motion.FACES_AT_ONCE])
    assert activations.FACES_AT_ONCE == motion.FACES_AT_ONCE
    assert activations.face_bytes(dataclasses.asdict(config), frames) == pytest.approx(live.peak, rel=0.06)


F_, H_, W_ = 21, 60, 104
GIVEN: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "clean": ({}, lambda: {"clean_BCFhw": torch.empty(1, 16, 1, H_, W_)}),
    "vace": ({"vace": VaceConfig((0, 1))}, lambda: {"vace": VaceConditions(torch.empty(1, 96, F_, H_, W_))}),
    "camera": (
        {"camera": CameraConfig()}, lambda: {"camera": CameraConditions([torch.empty(1, 24, 8 * H_, 8 * W_)] * F_)}
    ),
    "reference": (
        {"reference": ReferenceConfig(16)}, lambda: {"reference": ReferenceConditions(torch.empty(1, 16, H_, W_))}
    ),
    "speech": (
        {"speech": SpeechConfig((0, 1))},
        lambda: {
            "speech": SpeechConditions(
                torch.empty(1, 25, 1024, 4 * F_), torch.empty(1, 16, 1, H_, W_), torch.empty(1, 16, 19, H_, W_),
                torch.empty(1, 16, F_, H_, W_),
            )
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("branches", "parts"), [(1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("adapter", GIVEN)
def test_dit_with_what_adapters_add_and_keep(adapter: str, branches: int, parts: int) -> None:
    structure, given = GIVEN[adapter]
    with torch.inference_mode(), torch.device("meta"):
        config = WanConfig(
            dim=5120, ffn_dim=13824, num_layers=2, in_channels=16, out_channels=16, text_dim=512, **structure
        )
        fields = dataclasses.asdict(config)
        tokens = F_ * H_ * W_ // 4 + activations.tokens_beside(fields, H_, W_, motion=True)
        dit = WanDiT(config).requires_grad_(False).eval()
        dit.attention, dit.ffn_tokens = flash, None if parts == 1 else -(-tokens // parts)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if stays_float32(name) else torch.bfloat16)
        conditions, x = Conditions((torch.empty(40, 512),), **given()), torch.empty(1, 16, F_, H_, W_)
        with Live() as live:
            negative = dataclasses.replace(conditions, text=(torch.empty(40, 512),))
            contexts = dit.prepare_branches([conditions, negative][:branches])
            kept, live.peak = live.now, live.now
            stream = dit._enter(x, torch.empty(1), contexts[0])
            assert stream.tokens_BLD.shape[1] == tokens
            timesteps = len(stream.segments)
            del stream
            dit(x, torch.empty(1), *contexts)
    rows = sum(context.text.rows.shape[1] for context in contexts)
    predicted = activations.dit_bytes(
        fields, tokens, rows, 2, branches=branches, ffn_tokens=dit.ffn_tokens, timesteps=timesteps
    )
    predicted += activations.adapter_bytes(fields, tokens, 2)
    assert predicted == pytest.approx(live.peak, rel=0.06), f"{kept / 1e9:.2f} GB kept"


@pytest.mark.parametrize(
    ("dtype", "cells", "branches"), [("bfloat16", 128, 1), ("bfloat16", 64, 2), ("float32", 128, 1)]
)
def test_flux(dtype: str, cells: int, branches: int) -> None:
    with torch.inference_mode(), torch.device("meta"):
        config = FluxConfig(num_double=2, num_single=2)
        dit = FluxDiT(config).requires_grad_(False).eval()
        dit.attention = flash
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if flux_stays_float32(name) else getattr(torch, dtype))
        told = Conditions((torch.empty(512, 4096),), flux=FluxConditions(torch.empty(1, 768), 3.5))
        contexts = [dit.prepare(told) for _ in range(branches)]
        x, timesteps = torch.empty(1, 16, 1, cells, cells), torch.empty(1)
        with Live() as live:
            dit(x, timesteps, *contexts)
    size = 2 if dtype == "bfloat16" else 4
    predicted = flux_cost.transformer_bytes(dataclasses.asdict(config), cells**2 // 4, 512, size, branches=branches)
    assert predicted == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("tile", [None, 48])
@pytest.mark.parametrize("decoder", [False, True])
def test_flux_autoencoder(decoder: bool, tile: int | None) -> None:
    rows, columns = 96, 128
    with torch.inference_mode(), torch.device("meta"):
        config = FluxVAEConfig()
        vae = FluxVAE(config).requires_grad_(False).eval()
        latents, image = torch.empty(1, 16, 1, rows, columns), torch.empty(1, 3, 1, 8 * rows, 8 * columns)
        pixels = None if tile is None else 8 * tile
        with Live() as live:
            made = list(vae.decode_chunks(latents, tile=pixels)) if decoder else vae.encode(image, tile=pixels)
    del made
    predicted = flux_cost.autoencoder_bytes(dataclasses.asdict(config), rows, columns, 4, decoder=decoder, tile=tile)
    assert predicted == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize(("version", "rows", "columns", "chunk"), [("2.1", 60, 104, 1), ("2.1", 90, 160, 2),
                                                                   ("2.2", 44, 80, 1), ("2.2", 30, 52, 3)])  # fmt: skip
@pytest.mark.parametrize("decoder", [False, True])
def test_vae(version: str, rows: int, columns: int, chunk: int, decoder: bool) -> None:
    new = version == "2.2"
    with torch.inference_mode(), torch.device("meta"):
        config = WanVAEConfig(
            version=version, dim=160 if new else 96, dec_dim=256 if new else 96, z_dim=48 if new else 16
        )
        vae = WanVAE(config).requires_grad_(False).eval()
        stride = vae.spatial_stride
        latents = torch.empty(1, vae.z_dim, 1 + 3 * chunk, rows, columns)
        video = torch.empty(1, 3, 1 + 12 * chunk, rows * stride, columns * stride)
        with Live() as live:
            for part in vae.decode_chunks(latents, chunk) if decoder else vae.encode_chunks(video, chunk):
                del part
    predicted = activations.vae_bytes(dataclasses.asdict(config), rows, columns, 4, decoder=decoder, chunk=chunk)
    assert predicted == pytest.approx(live.peak, rel=0.04)


def test_tiles_are_as_large_as_those_of_the_autoencoder() -> None:
    from kinema.models.wan_vae_tiles import spans

    for length in (20, 52, 60, 90, 104, 160):
        for tile in (8, 10, 16, 32, 64, 200):
            ((start, stop), _), *_ = spans(length, tile)
            assert activations.tile_cells(length, tile) == stop - start


def test_a_feed_forward_in_the_planned_parts_is_no_longer_the_fullest_moment() -> None:
    for dim, ffn_dim in DITS.values():
        for size in (2, 4):
            config = {"dim": dim, "ffn_dim": ffn_dim, "num_layers": 1}
            part = -(-30_000 // activations.ffn_pieces(config, size))
            narrow = {**config, "ffn_dim": 1}
            with_parts = activations.dit_bytes(config, 30_000, 0, size, ffn_tokens=part)
            assert with_parts <= 1.02 * activations.dit_bytes(narrow, 30_000, 0, size)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_vae_of_one_frame(version: str, decoder: bool) -> None:
    new = version == "2.2"
    with torch.inference_mode(), torch.device("meta"):
        config = WanVAEConfig(
            version=version, dim=160 if new else 96, dec_dim=256 if new else 96, z_dim=48 if new else 16
        )
        vae = WanVAE(config).requires_grad_(False).eval()
        latents = torch.empty(1, vae.z_dim, 1, 60, 104)
        picture = torch.empty(1, 3, 1, 60 * vae.spatial_stride, 104 * vae.spatial_stride)
        with Live() as live:
            for part in vae.decode_chunks(latents) if decoder else vae.encode_chunks(picture):
                del part
    predicted = activations.vae_bytes(dataclasses.asdict(config), 60, 104, 4, decoder=decoder, still=True)
    assert predicted == pytest.approx(live.peak, rel=0.06)
