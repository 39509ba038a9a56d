"""The Animate adapter against tensors of the official code, and against diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from checkpoints import write
from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models.adapters.animate import Animate
from kinema.models.adapters.motion import blur_kernel
from kinema.models.wan import Context, WanConfig, WanDiT, constant, stays_float32
from kinema.models.wan_blocks import KVCache
from kinema.models.wan_config import AnimateConfig
from kinema.schema import ModelRef
from kinema.tensors import AnimateConditions, Conditions
from kinema.weights.detect import inspect
from kinema.weights.load import load

Given = tuple[WanDiT, Tensor, Tensor, Conditions, Context, Tensor]


@pytest.fixture(scope="module")
def given() -> Given:
    """(model, x, timesteps, conditions, context, golden velocity); preparing 9 faces of 512 pixels takes its time."""
    spec, tensors = golden("dit_animate")
    config, shapes, salt = spec["config"], spec["inputs"], spec["salt"]
    model = WanDiT(
        WanConfig(
            config["dim"], config["ffn_dim"], config["num_layers"], config["in_dim"], config["out_dim"],
            config["text_dim"], config["text_len"], config["freq_dim"], has_clip_tokens=True, animate=AnimateConfig(),
        )
    ).eval()  # fmt: skip
    fill(model, salt)

    def one(key: str) -> Tensor:
        return input_tensor(key, shapes[key], salt)

    face = input_tensor("face", (1, 3, 9, 512, 512), salt, scale=0.5 * 1.7)
    animate = AnimateConditions(one("pose0")[None], face)
    conditions = Conditions((one("context0"),), one("clip_fea"), one("y0")[None], animate=animate)
    with torch.no_grad():
        context = model.prepare(conditions)
    return model, one("x0")[None], torch.tensor(shapes["t"]), conditions, context, tensors["out0"]


@torch.no_grad()
def velocity(given: Given, context: Context | None = None) -> Tensor:
    model, x, timesteps, _, prepared, _ = given
    out: Tensor = model(x, timesteps, context or prepared)[0]
    return out


def adapter_of(model: WanDiT) -> Animate:
    adapter = model.adapters[0]
    assert isinstance(adapter, Animate)
    return adapter


def test_golden(given: Given):
    assert_golden(velocity(given), given[-1])


# --- planted faults --------------------------------------------------------------------------------


def test_faults_in_the_state_are_caught(given: Given):
    """Swapped keys and values, a skeleton one frame late, the reference frame's face left out: none passes."""
    context = given[4]
    adapter, state = context.adapters[0]
    velocity(given)
    late = state.pose_BLD.roll(12, 1)
    swapped = KVCache(state.faces.rows, {block: (v, k) for block, (k, v) in state.faces.made.items()})
    without_reference = KVCache(state.faces.rows.roll(-1, 1))
    faults = (
        replace(state, faces=swapped),
        replace(state, pose_BLD=late),
        replace(state, faces=without_reference),
        replace(state, pose_BLD=torch.zeros_like(late)),
    )
    for fault in faults:
        with pytest.raises(AssertionError, match="off by"):
            assert_golden(velocity(given, replace(context, adapters=((adapter, fault),))), given[-1])


def test_a_face_block_at_another_place_is_caught(given: Given, monkeypatch: pytest.MonkeyPatch):
    adapter = adapter_of(given[0])
    monkeypatch.setattr(adapter, "_after", lambda index: adapter.blocks[0] if index == 1 else None)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(given), given[-1])


SMALL = AnimateConfig((4, 6, 8), motion_width=12, motion_dim=5, face_width=16, face_heads=2, interval=1)


def small(config: AnimateConfig = SMALL) -> WanDiT:
    model = WanDiT(WanConfig(128, 64, 2, 16, 16, 8, 4, 32, animate=config)).eval()
    fill(model, 7)
    return model


def test_the_kernel_of_a_blur_is_flipped():
    """A kernel that is not symmetric tells: the golden's are random, so it fails without the flip."""
    model = small()
    blur = adapter_of(model).motion_encoder.enc.net_app.convs[1].conv2[0]
    spike = torch.zeros(1, 1, 9, 9)
    spike[..., 4, 4] = 1
    out = blur(spike)[0, 0]
    assert torch.allclose(out[3:7, 3:7], blur.kernel), "a true convolution draws its kernel at a spike"


# --- what it keeps to ------------------------------------------------------------------------------


@torch.no_grad()
def test_one_face_stands_for_all_frames():
    """The unconditional branch is told one black face for a whole segment: the same as 9 of them."""
    adapter = adapter_of(small())
    pose = torch.zeros(1, 16, 3, 4, 4)
    black = torch.full((1, 3, 9, SMALL.face_size, SMALL.face_size), -1.0)
    all_of_them = adapter.face_tokens(AnimateConditions(pose, black))
    assert all_of_them.shape == (1, 4, 3, 128) and not all_of_them[:, 0].any()
    assert_golden(adapter.face_tokens(AnimateConditions(pose, black[:, :, :1])), all_of_them, 1e-6)


def test_inputs_of_other_lengths_are_refused():
    model = small()
    pose, face = torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 3, 5, SMALL.face_size, SMALL.face_size)
    conditions = Conditions((torch.zeros(2, 8),), animate=AnimateConditions(pose, face))
    with pytest.raises(ValueError, match="faces of 2 latent frames, a pose of 3"):
        model.prepare(conditions)
    right = replace(conditions, animate=AnimateConditions(pose, face[:, :, :1]))
    context = model.prepare(right)
    with pytest.raises(ValueError, match="the pose has 12 tokens"), torch.no_grad():
        model(torch.zeros(1, 16, 3, 4, 4), torch.tensor([5.0]), context)


def test_face_blocks_travel_with_their_main_blocks():
    adapter = adapter_of(small(replace(SMALL, interval=2)))
    assert [len(list(adapter.companions(index))) for index in range(4)] == [1, 0, 0, 0]


def test_what_reads_faces_stays_float32():
    model = small()
    kept = {name for name in model.state_dict() if stays_float32(name)}
    assert {name for name in model.state_dict() if name.startswith(("motion_encoder", "face_encoder", "pose"))} <= kept
    assert "face_adapter.fuser_blocks.0.linear1_q.weight" not in kept


def test_the_constant_kernel():
    assert torch.equal(blur_kernel() * 64, torch.tensor([[a * b for b in (1, 3, 3, 1)] for a in (1.0, 3, 3, 1)]))
    assert constant("motion_encoder.enc.net_app.convs.1.skip.0.kernel") is not None
    assert constant("motion_encoder.enc.fc.0.bias") is None


# --- diffusers -------------------------------------------------------------------------------------


def test_a_file_in_diffusers_names_gives_what_diffusers_gives(tmp_path: Path):
    """Their names, the joined keys and values, the norms and the kernels they leave out: all in one comparison."""
    from diffusers import WanAnimateTransformer3DModel

    sizes = {
        str(side): width
        for side, width in zip((4, 8, 16, 32, 64, 128, 256, 512), (8, 8, 8, 6, 6, 4, 4, 2), strict=True)
    }
    theirs = WanAnimateTransformer3DModel(
        num_attention_heads=1, ffn_dim=96, num_layers=10, text_dim=24, freq_dim=32, image_dim=32, added_kv_proj_dim=128,
        motion_encoder_channel_sizes=sizes, motion_style_dim=12, motion_dim=4, motion_encoder_dim=12,
        face_encoder_hidden_dim=16,
    ).eval()  # fmt: skip
    fill(theirs, 5)
    file = write(tmp_path / "dit.safetensors", theirs.state_dict())
    facts = inspect(file)
    assert facts.dialect == "diffusers"
    assert facts.config["animate"] == {
        "channels": [2, 4, 4, 6, 6, 8, 8, 8], "motion_width": 12, "motion_dim": 4, "face_width": 16, "face_heads": 4,
        "interval": 5, "pose_channels": 16,
    }  # fmt: skip
    ref = ModelRef(
        component="dit",
        files=(file,),
        dialect="diffusers",
        container="safetensors",
        config=facts.config,
        dtype="float32",
    )
    ours = cast(WanDiT, load(ref))
    torch.manual_seed(0)
    x, y, pose = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 20, 3, 4, 6), torch.randn(1, 16, 2, 4, 6)
    face, clip, text = torch.rand(1, 3, 5, 512, 512) * 2 - 1, torch.randn(1, 5, 32), torch.randn(512, 24)
    timesteps = torch.tensor([731.0])
    with torch.no_grad():
        want = theirs(torch.cat([x, y], 1), timesteps, text[None], clip, pose, face).sample
        conditions = Conditions((text,), clip, y, animate=AnimateConditions(pose, face))
        assert_golden(ours(x, timesteps, ours.prepare(conditions)), want)
