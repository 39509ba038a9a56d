"""S2V's adapter against tensors of the official code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models.adapters import speech
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_config import SpeechConfig
from kinema.tensors import Conditions, SpeechConditions

GOLDENS = ["dit_s2v", "dit_s2v_drop_motion"]


def load(name: str) -> tuple[WanDiT, Tensor, Tensor, Conditions, Tensor]:
    """Return (model, x, timesteps, conditions, golden velocity) of one golden file, each a batch of one."""
    spec, tensors = golden(name)
    given, shapes, salt = spec["config"], spec["inputs"], spec["salt"]
    config = WanConfig(
        given["dim"], given["ffn_dim"], given["num_layers"], given["in_dim"], given["out_dim"], given["text_dim"],
        given["text_len"], given["freq_dim"],
        speech=SpeechConfig(tuple(given["audio_inject_layers"]), given["audio_dim"]),
    )  # fmt: skip
    model = WanDiT(config).eval()
    fill(model, salt)

    def batch(key: str) -> Tensor:
        return input_tensor(key, shapes[key], salt)[None]

    conditions = SpeechConditions(
        audio_BLDT=input_tensor("audio", shapes["audio"], salt),
        reference_BCFhw=batch("ref0"),
        motion_BCFhw=None if shapes["drop_motion_frames"] else batch("motion0"),
        pose_BCFhw=batch("cond0"),
        history_frames=shapes["motion_frames"][1],
    )
    text = (input_tensor("context0", shapes["context0"], salt),)
    return model, batch("x0"), torch.tensor(shapes["t"]), Conditions(text, speech=conditions), tensors["out0"]


@torch.no_grad()
def velocity(model: WanDiT, x: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    out: Tensor = model(x, timesteps, model.prepare(conditions))[0]
    return out


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str):
    model, x, timesteps, conditions, want = load(name)
    assert_golden(velocity(model, x, timesteps, conditions), want)


def test_two_requests_in_one_batch_do_not_mix():
    model, x, timesteps, conditions, want = load("dit_s2v")
    other = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    given = conditions.speech
    assert given is not None
    twice = {
        name: torch.cat([getattr(given, name), getattr(given, name).flip(-1)])
        for name in ("audio_BLDT", "reference_BCFhw", "motion_BCFhw", "pose_BCFhw")
    }
    both = Conditions(conditions.text * 2, speech=replace(given, **twice))
    x_two = torch.cat([x, other[:1]])
    with torch.no_grad():
        out = model(x_two, timesteps.repeat(2), model.prepare(both))
    assert_golden(out[0], want)


def test_motion_stands_where_the_weights_were_trained():
    near, middle, far = speech.motion_positions(44, 64)
    assert [near[0], middle[0], far[0]] == [[-1], [-3], [-19, -14, -9, -4]]
    assert near[1:] == (list(range(44)), list(range(64)))
    assert (middle[1][0], middle[1][-1], len(middle[1])) == (0, 43, 22)
    assert (far[2][0], far[2][-1], len(far[2])) == (0, 63, 16)


# --- planted faults --------------------------------------------------------------------------------


def refuse(conditions: Conditions, name: str = "dit_s2v") -> None:
    model, x, timesteps, _, want = load(name)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


@pytest.mark.parametrize("lost", ["motion_BCFhw", "pose_BCFhw"])
def test_without_a_condition_fails(lost: str):
    conditions = load("dit_s2v")[3]
    refuse(replace(conditions, speech=replace(conditions.speech, **{lost: None})))


def test_sound_of_another_time_fails():
    conditions = load("dit_s2v")[3]
    refuse(replace(conditions, speech=replace(conditions.speech, audio_BLDT=conditions.speech.audio_BLDT.roll(1, -1))))


@pytest.mark.parametrize(
    ("name", "value"), [("REFERENCE_TIME", 29), ("BUCKETS", (1, 4, 16)), ("MOTION", speech.REFERENCE)]
)
def test_another_constant_fails(name: str, value: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speech, name, value)
    refuse(load("dit_s2v")[3])


def test_injection_after_another_block_fails():
    model, x, timesteps, conditions, want = load("dit_s2v")
    model.adapters[0].places = {1: 0, 2: 1}
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(velocity(model, x, timesteps, conditions), want)


def test_sound_of_too_few_frames_is_refused():
    model, x, timesteps, conditions, _ = load("dit_s2v")
    short = replace(conditions.speech, audio_BLDT=conditions.speech.audio_BLDT[..., :8])
    with pytest.raises(ValueError, match="latent frames"):
        velocity(model, x, timesteps, replace(conditions, speech=short))
