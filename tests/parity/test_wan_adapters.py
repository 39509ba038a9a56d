"""Adapters of the Wan DiT against tensors of the official code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models.layers import rope_at, sinusoid
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_config import CameraConfig, ReferenceConfig, VaceConfig
from kinema.runtime.blocks import BlockStream, Ring
from kinema.schema import ModelRef
from kinema.tensors import CameraConditions, Conditions, ReferenceConditions, VaceConditions
from kinema.weights.detect import inspect
from kinema.weights.load import load as open_model

VACE = "dit_vace"
CAMERA = ["dit_fun_camera_21", "dit_fun_camera_22"]
REFERENCE = ["dit_fun_control_21_ref", "dit_fun_control_22_ref"]
GOLDENS = [VACE, *CAMERA, *REFERENCE]


def load(name: str) -> tuple[WanDiT, Tensor, Tensor, Conditions, Tensor]:
    """Return (model, x, timesteps, conditions, golden velocity) of one golden file, each a batch of one."""
    spec, tensors = golden(name)
    given, shapes, salt = spec["config"], spec["inputs"], spec["salt"]
    config = WanConfig(
        given["dim"], given["ffn_dim"], given["num_layers"], given["in_dim"], given["out_dim"], given["text_dim"],
        given["text_len"], given["freq_dim"], "clip_fea" in shapes,
        vace=VaceConfig(tuple(given["vace_layers"]), given["vace_in_dim"]) if "vace_layers" in given else None,
        camera=CameraConfig(given["in_dim_control_adapter"]) if "add_control_adapter" in given else None,
        reference=ReferenceConfig(given["in_dim_ref_conv"]) if "add_ref_conv" in given else None,
    )  # fmt: skip
    model = WanDiT(config).eval()
    fill(model, salt)

    def given_tensor(key: str) -> Tensor:
        return input_tensor(key, shapes[key], salt)

    conditions = Conditions(
        (given_tensor("context0"),),
        given_tensor("clip_fea") if "clip_fea" in shapes else None,
        input_tensor("y0", shapes["y"], salt) if "y" in shapes else None,
        vace=VaceConditions(given_tensor("vace_context0")[None], shapes["vace_context_scale"])
        if "vace_context0" in shapes
        else None,
        camera=CameraConditions(given_tensor("y_camera").unbind(2)) if "y_camera" in shapes else None,
        reference=ReferenceConditions(given_tensor("full_ref")) if "full_ref" in shapes else None,
    )
    return model, given_tensor("x0").reshape(1, 16, 3, 6, 8), torch.tensor(shapes["t"]), conditions, tensors["out0"]


@torch.no_grad()
def velocity(model: WanDiT, x: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    out: Tensor = model(x, timesteps, model.prepare(conditions))[0]
    return out


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str):
    model, x, timesteps, conditions, want = load(name)
    assert_golden(velocity(model, x, timesteps, conditions), want)


# --- planted faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDENS)
def test_without_the_adapter_fails(name: str):
    model, x, timesteps, conditions, want = load(name)
    bare = replace(conditions, vace=None, camera=None, reference=None)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, bare), want)


def test_a_hint_after_the_next_block_fails():
    model, x, timesteps, conditions, want = load(VACE)
    model.adapters[0].layers = tuple(layer + 1 for layer in model.adapters[0].layers)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_another_scale_fails(scale: float):
    model, x, timesteps, conditions, want = load(VACE)
    other = replace(conditions, vace=VaceConditions(conditions.vace.context_BCFhw, scale))
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, other), want)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_at_the_video_s_first_position_fails(name: str, monkeypatch: pytest.MonkeyPatch):
    model, x, timesteps, conditions, want = load(name)

    def from_one(*args: Any, **options: Any) -> Tensor:
        table = rope_at(*args, **options)
        return torch.cat([table[12:24], table[:-12]])

    monkeypatch.setattr("kinema.models.adapters.reference.rope_at", from_one)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


@pytest.mark.parametrize("name", CAMERA)
def test_frames_before_coordinates_fail(name: str):
    model, x, timesteps, conditions, want = load(name)
    other = [frame.unflatten(1, (6, 4)).transpose(1, 2).flatten(1, 2) for frame in conditions.camera.frames]
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, replace(conditions, camera=CameraConditions(other))), want)


# --- the hooks ---------------------------------------------------------------------------------------


def test_adapters_are_children_of_the_model_once():
    for name in GOLDENS:
        model = load(name)[0]
        (adapter,) = model.adapters
        own = {f"{child}.{key}" for child, module in adapter.named_children() for key in module.state_dict()}
        assert own and own < set(model.state_dict())
        assert len(list(model.parameters())) == len(model.state_dict())


def test_modules_that_go_with_a_block_are_those_its_visit_uses():
    model, x, timesteps, conditions, want = load(VACE)
    groups = model.block_groups()
    assert [group[1:] for group in groups] == [[model.vace_blocks[0]], [], [model.vace_blocks[1]], []]
    stream = BlockStream(groups, Ring("cpu"))
    model.run_blocks = stream
    assert all(tensor.is_meta for group in groups for module in group for tensor in module.parameters())
    assert_golden(velocity(model, x, timesteps, conditions), want)
    stream.ring.close()


@torch.no_grad()
def test_reference_tokens_are_noisy_where_the_first_frame_is_clean():
    """With one row a token, as VideoX-Fun fills its 2-D timesteps: the last one for the reference, 0 for frame 0."""
    model, x, timesteps, conditions, _ = load("dit_fun_control_22_ref")
    context = replace(model.prepare(conditions), clean_frames=1)
    stream = model.embed(x, torch.tensor([[0.0, 731.25]]), (12, 24), context)
    assert stream.segments == (12, 12, 24) and stream.front == 12
    time = model.time_embedding(sinusoid(torch.tensor([[731.25, 0.0, 731.25]]), model.config.freq_dim))
    assert_golden(stream.time_BRD, time, 1e-6)
    assert stream.video().segments == (0, 12, 24)
    streams = [stream]
    model.through_blocks(streams, [context])
    assert torch.equal(model(x, timesteps, context), model.unembed(streams[0]))


def test_wrong_conditions_are_refused():
    model, x, timesteps, conditions, _ = load(VACE)
    short = VaceConditions(conditions.vace.context_BCFhw[:, :, 1:])
    with pytest.raises(ValueError, match="VACE context has 24 tokens, the latents 36"):
        velocity(model, x, timesteps, replace(conditions, vace=short))
    with pytest.raises(ValueError, match="takes no camera conditions"):
        model.prepare(replace(conditions, camera=CameraConditions(torch.zeros(3, 1, 24, 48, 64))))


def test_conditions_move_with_all_they_hold():
    for name in GOLDENS:
        moved = load(name)[3].to("meta")
        for part in (moved.vace, moved.camera, moved.reference):
            assert part is None or all(tensor.is_meta for tensor in next(iter(vars(part).values())))
        assert moved.text[0].is_meta


# --- diffusers -----------------------------------------------------------------------------------------


def test_diffusers_vace(tmp_path: Path):
    """The same files, read by us: their class, saved by them, gives their velocity."""
    from diffusers import WanVACETransformer3DModel

    theirs = WanVACETransformer3DModel(
        num_attention_heads=2, in_channels=16, text_dim=40, freq_dim=64, ffn_dim=320, num_layers=4,
        vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    theirs.eval().save_pretrained(tmp_path / "transformer")
    facts = inspect(tmp_path / "transformer")
    assert facts.config["vace"] == {"layers": [0, 2], "in_channels": 96} and facts.dialect == "diffusers"
    recipe = {key: getattr(facts, key) for key in ("component", "files", "dialect", "container", "config")}
    ours: Any = open_model(ModelRef(**recipe, dtype="float32"))
    _, x, _, conditions, _ = load(VACE)
    text, control = input_tensor("t", (512, 40), 1), conditions.vace.context_BCFhw
    timesteps = torch.tensor([400.0])
    scales = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        want = theirs(x, timesteps, text[None], None, control, scales, return_dict=False)[0]
        got = ours(x, timesteps, ours.prepare(Conditions((text,), vace=VaceConditions(control, 0.7))))
    assert_golden(got, want, 1e-5)
