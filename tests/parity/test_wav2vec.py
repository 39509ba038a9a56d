"""wav2vec2 against transformers, and the way from its features to video frames against the official code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Wav2Vec2Config as TheirConfig
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models import wav2vec
from kinema.models.wav2vec import Wav2Vec, Wav2VecConfig, encode_audio, feature_places, num_features

SMALL = Wav2VecConfig(dim=32, num_layers=3, ffn_dim=48, conv_dim=16, position_kernel=16, position_width=8, head_dim=8)


def model() -> Wav2Vec:
    made = Wav2Vec(SMALL).eval().requires_grad_(False)
    fill(made, 5)
    return made


def theirs(ours: Wav2Vec) -> Wav2Vec2ForCTC:
    """The class the official code runs, with the same weights."""
    config = TheirConfig(
        vocab_size=10, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        conv_dim=[16] * 7, feat_extract_norm="layer", conv_bias=True, do_stable_layer_norm=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
        attn_implementation="eager",
    )  # fmt: skip
    oracle = Wav2Vec2ForCTC(config).eval()
    state = ours.state_dict()
    for old, new in (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        state[f"encoder.pos_conv_embed.conv.{new}"] = state.pop(f"encoder.pos_conv_embed.conv.{old}")
    missing, unexpected = oracle.wav2vec2.load_state_dict(state, strict=False)
    assert missing == ["masked_spec_embed"] and not unexpected
    return oracle


def sound(seconds: float, salt: int = 1) -> Tensor:
    return input_tensor("sound", (round(seconds * 16_000),), salt, 0.3) + 0.05


@torch.no_grad()
def test_every_hidden_state_equals_transformers():
    ours, wave = model(), sound(1.3)
    normal = Wav2Vec2FeatureExtractor(do_normalize=True)(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    result = theirs(ours).wav2vec2(normal.input_values, output_hidden_states=True)
    # Which state comes last, the output of the last layer or its norm, depends on the version of transformers and on
    # the class asked; the official code, with 4.51, reads the norm.
    oracle = [*result.hidden_states[: SMALL.num_layers], result.last_hidden_state]
    ours_LTD = ours(normal.input_values[0])
    assert len(ours_LTD) == SMALL.num_layers + 1
    assert ours_LTD.shape[1] == num_features(len(wave), SMALL)
    for state, want in zip(ours_LTD, oracle, strict=True):
        assert_golden(state, want[0], 1e-5)


@torch.no_grad()
def test_samples_are_normalised_as_the_official_processor_does():
    ours, wave = model(), sound(1.0)
    normal = Wav2Vec2FeatureExtractor(do_normalize=True)(wave.numpy(), sampling_rate=16_000, return_tensors="pt")
    states_LTD = ours(normal.input_values[0])
    rows, lower, share = feature_places(states_LTD.shape[1], 16, 16)
    picked = torch.lerp(
        states_LTD[:, lower], states_LTD[:, (lower + 1).clamp(max=len(states_LTD[0]) - 1)], share[:, None]
    )
    assert_golden(encode_audio(ours, wave, 16)[:, :, rows], picked.transpose(1, 2), 1e-5)


def test_convolutions_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch):
    ours, wave = model(), sound(2.0)
    whole = ours.convolve(wave)
    monkeypatch.setattr(wav2vec, "PIECE_FEATURES", 7)
    assert torch.allclose(ours.convolve(wave), whole, atol=1e-6)


def test_long_sound_in_windows_is_near_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Every frame is heard once, in order; what windows change is the far context of attention."""
    ours, wave = model(), sound(6.0)
    whole = encode_audio(ours, wave, 96)
    monkeypatch.setattr(wav2vec, "WINDOW_SECONDS", 4)
    monkeypatch.setattr(wav2vec, "CONTEXT_SECONDS", 1)
    parts = encode_audio(ours, wave, 96)
    far = (whole - whole.roll(1, -1)).abs().mean()
    assert 0 < (parts - whole).abs().mean() < 0.2 * far


def test_frames_hear_what_the_official_code_gives_them():
    spec, want = golden("s2v_audio")
    hidden = input_tensor("audio_hidden", spec["inputs"]["audio_hidden"], spec["salt"], 1.0)
    frames = len(want["bucket"])
    assert frames == spec["config"]["batch_frames"] * int(want["clips"].item())
    assert_golden(bucket(hidden, frames), want["bucket"])


def bucket(hidden_LTD: Tensor, frames: int, fps: float = 16) -> Tensor:
    rows, lower, share = feature_places(hidden_LTD.shape[1], frames, fps)
    out = torch.zeros(frames, len(hidden_LTD), hidden_LTD.shape[2])
    upper = (lower + 1).clamp(max=hidden_LTD.shape[1] - 1)
    out[rows] = torch.lerp(hidden_LTD[:, lower], hidden_LTD[:, upper], share[:, None]).transpose(0, 1)
    return out


@pytest.mark.parametrize(("rate", "fps"), [("FEATURE_RATE", 49), ("INDEX_RATE", 25)])
def test_another_rate_is_caught(rate: str, fps: int, monkeypatch: pytest.MonkeyPatch):
    spec, want = golden("s2v_audio")
    hidden = input_tensor("audio_hidden", spec["inputs"]["audio_hidden"], spec["salt"], 1.0)
    monkeypatch.setattr(wav2vec, rate, fps)
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(bucket(hidden, 48), want["bucket"])


def test_frames_after_the_sound_hear_nothing():
    features = encode_audio(model(), sound(1.0), 24)
    assert features.shape == (4, 32, 24)
    assert features[:, :, :16].abs().amin(dim=(0, 1)).min() >= 0 and features[:, :, 2].any()
    assert not features[:, :, 16:].any()


def test_a_stop_is_heard_between_layers():
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_audio(model(), sound(1.0), 16, stop=stop)
    assert len(calls) == 2
