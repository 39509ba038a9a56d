"""WanVAE against the official code's numbers, and the streaming properties that users rely on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.errors import RequestError
from kinema.models import wan_vae_tiles
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.models.wan_vae_layers import History
from kinema.models.wan_vae_tiles import Tile, run_tiles, tile_grid
from kinema.weights.files import open_tensors
from kinema.weights.keys import translate

VERSIONS = ("2.1", "2.2")
EXCHANGE = History.exchange
BOUND_OF_TILES = 0.2
"""Root mean square distance of 12-cell tiles from the whole frame, in its deviations; measured 0.06 to 0.17."""


def golden_vae(name: str) -> tuple[WanVAE, dict[str, Tensor], dict[str, Tensor]]:
    spec, want = golden(name)
    config = spec["config"]
    vae = WanVAE(
        WanVAEConfig(
            version="2.1" if name == "vae21" else "2.2",
            dim=config["dim"],
            dec_dim=config.get("dec_dim"),
            z_dim=config["z_dim"],
            dim_mult=tuple(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            temporal_downsample=tuple(config["temperal_downsample"]),
        )
    )
    vae.eval().requires_grad_(False)
    fill(vae, spec["salt"])
    scales = {"video": 1.0, "latent": 1.7}
    inputs = {key: input_tensor(key, shape, spec["salt"], scales[key]) for key, shape in spec["inputs"].items()}
    return vae, inputs, want


def small_vae(version: str) -> WanVAE:
    config = WanVAEConfig(version, dim=8, dec_dim=16, z_dim=16 if version == "2.1" else 48, num_res_blocks=1)
    vae = WanVAE(config).eval().requires_grad_(False)
    fill(vae, salt=3)
    return vae


def small_inputs(vae: WanVAE, latent_frames: int = 5, h: int = 3, w: int = 4) -> tuple[Tensor, Tensor]:
    """A clip and latents of the same grid."""
    frames, stride = 4 * (latent_frames - 1) + 1, vae.spatial_stride
    video = input_tensor("video", (2, 3, frames, h * stride, w * stride), 0, 1.0)
    return video, input_tensor("latent", (2, vae.z_dim, latent_frames, h, w), 0)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# --- the official numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_golden(name: str) -> None:
    vae, inputs, want = golden_vae(name)
    assert_golden(vae.encode(inputs["video"]), want["encode"])
    assert_golden(vae.encode(inputs["video"][:, :, :1]), want["encode_first_frame"])
    assert_golden(vae.decode(inputs["latent"]), want["decode"])


def remember_one_frame(history: History, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
    """A cache of one frame where the convolutions need two."""
    past = EXCHANGE(history, layer, x, frames)
    if layer in history and frames == 2:
        history[layer][:, :, 0] = 0
    return past


def keep_the_first_frame(history: History, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
    """Upsamplers that see the first frame, where the official code shows them zeros."""
    return EXCHANGE(history, layer, x if x.any() else x + 1, frames)


@pytest.mark.parametrize("fault", [remember_one_frame, keep_the_first_frame])
@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_golden_catches_a_wrong_history(name: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, inputs, want = golden_vae(name)
    monkeypatch.setattr(History, "exchange", fault)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(vae.decode(inputs["latent"]), want["decode"])


@pytest.mark.parametrize(("version", "parameters", "tensors"), [("2.1", 126_892_531, 194), ("2.2", 704_688_668, 196)])
def test_full_size(version: str, parameters: int, tensors: int) -> None:
    sizes = {"2.1": {"dim": 96, "z_dim": 16}, "2.2": {"dim": 160, "dec_dim": 256, "z_dim": 48}}
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig(version, **sizes[version]))
    assert sum(weight.numel() for weight in vae.parameters()) == parameters
    assert len(vae.state_dict()) == tensors


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_agrees(version: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    nested = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 16}
    theirs = AutoencoderKLWan(base_dim=8, z_dim=16 if version == "2.1" else 48, **(nested if version == "2.2" else {}))
    theirs.eval().requires_grad_(False)
    fill(theirs, salt=5)
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    names = translate(open_tensors(tmp_path / "vae.safetensors"))
    ours = WanVAE(WanVAEConfig(version, dim=8, dec_dim=8 if version == "2.1" else 16, z_dim=theirs.config.z_dim))
    ours.load_state_dict({official: names.read(official) for official in names.sources})
    ours.eval().requires_grad_(False)

    video, latents = small_inputs(ours, latent_frames=3)
    means, log_variances = ours.moments(video)
    posterior = theirs.encode(video).latent_dist
    assert_golden(means, posterior.mean)
    assert_golden(log_variances.clamp(-30, 20), posterior.logvar)
    assert_golden(ours.decode(latents).clamp(-1, 1), theirs.decode(ours.denormalise(latents)).sample)


# --- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_numbers_do_not_depend_on_the_chunk(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae(version)
    video, latents = small_inputs(vae)
    encoded, decoded = vae.encode(video), vae.decode(latents)
    assert [part.shape[2] for part in vae.decode_chunks(latents, chunk=3)] == [1, 12, 4]
    for chunk in (2, 3, 99):
        assert relative(vae.encode(video, chunk), encoded) < 1e-5
        assert relative(vae.decode(latents, chunk), decoded) < 1e-5
    monkeypatch.setattr(History, "exchange", remember_one_frame)
    assert relative(vae.encode(video, 2), encoded) > 1e-2
    assert relative(vae.decode(latents, 2), decoded) > 1e-2


@pytest.mark.parametrize("version", VERSIONS)
def test_later_frames_do_not_change_earlier_ones(version: str) -> None:
    vae = small_vae(version)
    video, latents = small_inputs(vae)
    assert relative(vae.encode(video[:, :, :9]), vae.encode(video)[:, :, :3]) < 1e-5
    assert relative(vae.decode(latents[:, :, :3]), vae.decode(latents)[:, :, :9]) < 1e-5


def test_two_clips_at_once_do_not_mix() -> None:
    vae = small_vae("2.1")
    _, latents = small_inputs(vae)
    first, second = vae.decode_chunks(latents[:1]), vae.decode_chunks(latents[1:])
    parts = list(zip(first, second, strict=True))
    both = torch.cat([torch.cat(frames, dim=2) for frames in zip(*parts, strict=True)])
    assert relative(both, vae.decode(latents)) < 1e-5


def test_gradients_reach_every_weight_and_the_clip() -> None:
    vae = small_vae("2.1").requires_grad_(True)
    video = small_inputs(vae, latent_frames=3)[0].requires_grad_(True)
    mean, log_variance = vae.moments(video, chunk=99)
    frames = vae.decode(vae.normalise(mean), chunk=99)
    (frames.square().mean() + log_variance.square().mean()).backward()
    assert video.grad is not None and video.grad.abs().min() > 0
    assert [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_moments_give_the_statistics_of_a_custom_model() -> None:
    plain = small_vae("2.1")
    video, _ = small_inputs(plain)
    mean, _ = plain.moments(video)
    axes = (0, 2, 3, 4)
    own = WanVAEConfig(
        dim=8,
        dec_dim=16,
        num_res_blocks=1,
        latent_mean=tuple(mean.mean(axes).tolist()),
        latent_std=tuple(mean.std(axes).tolist()),
    )
    vae = WanVAE(own).requires_grad_(False)
    vae.load_state_dict(plain.state_dict())
    latents = vae.encode(video)
    torch.testing.assert_close(latents.mean(axes), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(axes), torch.ones(16), atol=1e-4, rtol=0)
    assert relative(vae.decode(latents), plain.decode(plain.normalise(mean))) < 1e-4


# --- memory --------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of every tensor storage alive that the collector looks at."""
    gc.collect()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), Tensor))
    }
    return sum(storages.values())


def growth(chunks: Iterator[Tensor]) -> int:
    """Bytes gained between the third chunk and the last but one, each dropped by the caller."""
    alive = []
    gc.collect()
    gc.freeze()  # what was there before, all libraries among it, need not be gone through at every chunk
    try:
        for part in chunks:
            del part
            alive.append(live_bytes())
    finally:
        gc.unfreeze()
    return alive[-2] - alive[2]


@pytest.mark.parametrize("tile", [None, 64])
def test_decode_memory_does_not_grow_with_the_clip(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae("2.1")
    _, latents = small_inputs(vae, latent_frames=7, h=8, w=10)
    assert growth(vae.decode_chunks(latents, tile=tile)) == 0

    leaked: list[Tensor] = []

    def leak(history: History, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
        past = EXCHANGE(history, layer, x, frames)
        leaked.extend([] if past is None else [past])
        return past

    monkeypatch.setattr(History, "exchange", leak)
    assert growth(vae.decode_chunks(latents, tile=tile)) > 0


def test_history_keeps_no_more_than_it_needs() -> None:
    history, layer = History(), nn.Identity()
    history.exchange(layer, torch.ones(1, 2, 1, 4, 4), frames=2)
    history.exchange(layer, torch.ones(1, 2, 100, 4, 4), frames=2)
    assert history.bytes() == 2 * 2 * 4 * 4 * 4
    history.last = True
    history.exchange(layer, torch.ones(1, 2, 1, 4, 4), frames=2)
    assert not history, "nothing follows the last chunk"


# --- tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tile_as_large_as_the_frame_changes_nothing(version: str) -> None:
    vae = small_vae(version)
    video, latents = small_inputs(vae, latent_frames=2, h=8, w=9)
    assert torch.equal(vae.encode(video, tile=9 * vae.spatial_stride), vae.encode(video))
    assert torch.equal(vae.decode(latents, tile=640), vae.decode(latents))


@pytest.mark.parametrize(("height", "width", "tile"), [(8, 9, 8), (30, 52, 16), (45, 80, 8), (17, 16, 16)])
def test_tiles_cover_the_frame_with_weights_that_sum_to_one(height: int, width: int, tile: int) -> None:
    frames = input_tensor("frames", (1, 2, 3, height, width), 0)

    def enlarge(x: Tensor, history: History) -> Tensor:
        return x.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)

    tiles = tile_grid(height, width, tile)
    assert len(tiles) > 1
    assert all(max(t.rows[1] - t.rows[0], t.columns[1] - t.columns[0]) <= tile for t in tiles)
    blended = run_tiles(enlarge, frames, tiles, read=1, write=4, last=False)
    torch.testing.assert_close(blended, enlarge(frames, History()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_tiles_stay_near_the_whole_frame(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights on noise are the worst case: every edge pads with zeros what was not zero."""
    vae = small_vae(version)
    video, latents = (x[:1] for x in small_inputs(vae, latent_frames=2, h=9, w=16))
    whole, encoded = vae.decode(latents), vae.encode(video)

    def distance(got: Tensor, want: Tensor) -> float:
        return ((got - want).square().mean().sqrt() / want.std()).item()

    small, large = (distance(vae.decode(latents, tile=cells * vae.spatial_stride), whole) for cells in (8, 12))
    assert large < BOUND_OF_TILES < small, "larger tiles are nearer"
    assert distance(vae.encode(video, tile=12 * vae.spatial_stride), encoded) < BOUND_OF_TILES

    monkeypatch.setattr(wan_vae_tiles, "ramp", lambda size, overlaps, cell, device: torch.ones(size * cell))
    assert distance(vae.decode(latents, tile=12 * vae.spatial_stride), whole) > BOUND_OF_TILES


def test_each_tile_needs_its_own_history(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae("2.1")
    _, latents = small_inputs(vae, latent_frames=3, h=8, w=14)
    own = vae.decode(latents, tile=64)
    shared = History()
    monkeypatch.setattr(wan_vae_tiles, "Tile", lambda *where: Tile(*where, history=shared))
    with pytest.raises((AssertionError, RuntimeError)):
        assert relative(vae.decode(latents, tile=64), own) < 1e-5


# --- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_refused() -> None:
    vae = small_vae("2.1")
    video, latents = small_inputs(vae)
    with pytest.raises(RequestError, match=r"8 frames is not 4n\+1; nearest are 5 and 9"):
        vae.encode(video[:, :, :8])
    with pytest.raises(RequestError, match="30x24 does not divide by 8"):
        vae.encode(video[..., :30])
    with pytest.raises(RequestError, match="chunk 0"):
        vae.decode(latents, chunk=0)
    for tile in (0, 100, 56):
        with pytest.raises(RequestError, match=f"tile {tile} is not a multiple of 8 from 64 up"):
            vae.decode(latents, tile=tile)
    with pytest.raises(RequestError, match="16 and 16 values for 8 latent channels"):
        WanVAEConfig(z_dim=8)
