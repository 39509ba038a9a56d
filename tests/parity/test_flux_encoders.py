"""T5, CLIP-L, its tokenizer and SigLIP against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from golden_weights import assert_golden, fill, input_tensor
from kinema.errors import CatalogError, CheckpointError
from kinema.models.clip_text import ClipText, ClipTextConfig
from kinema.models.encoders import UMT5, TextEncoderConfig
from kinema.models.siglip import Siglip, SiglipConfig
from kinema.models.tokenizer import ClipTokenizer
from kinema.weights.dialect import Rule
from kinema.weights.keys_encoders import TEXT_TRANSFORMERS
from tiny_flux import clip_tables

T5 = TextEncoderConfig(
    vocab=60, dim=32, dim_attn=24, num_heads=4, ffn_dim=40, num_layers=3, num_buckets=32, shared_bias=True
)


def translated(state: dict[str, torch.Tensor], rules: tuple[Rule, ...]) -> dict[str, torch.Tensor]:
    import re

    found = {}
    for name, tensor in state.items():
        rule = next(rule for rule in rules if re.fullmatch(rule.pattern, name))
        found[re.sub(rule.pattern, rule.official, name)] = tensor
    return found


@torch.no_grad()
def test_t5_equals_transformers() -> None:
    from transformers import T5Config, T5EncoderModel

    theirs = T5EncoderModel(
        T5Config(
            vocab_size=60, d_model=32, d_kv=6, d_ff=40, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    fill(theirs, 3)
    theirs.encoder.embed_tokens.weight = theirs.shared.weight
    ours = UMT5(T5).eval()
    ours.load_state_dict(translated(theirs.state_dict(), TEXT_TRANSFORMERS))
    ids = torch.tensor([[5, 9, 17, 3, 1, 0, 0, 0]])
    want = theirs(input_ids=ids).last_hidden_state
    assert_golden(ours.encode(ids), want, 1e-5)
    assert "blocks.1.pos_embedding.embedding.weight" not in ours.state_dict()


@torch.no_grad()
def test_pooled_clip_text_equals_transformers() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = 59
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=60, hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=58, eos_token_id=end, pad_token_id=end,
        )
    ).eval()  # fmt: skip
    fill(theirs, 3)
    ours = ClipText(ClipTextConfig(vocab=60, num_positions=12, dim=128, mlp_dim=96, num_layers=3)).eval()
    ours.load_state_dict({name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()})
    ids = (58, 4, 7, 31, end)
    want = theirs(input_ids=torch.tensor([[*ids, end, end, end]])).pooler_output
    assert_golden(ours.encode(ids), want, 1e-5)


@torch.no_grad()
def test_siglip_equals_transformers() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14,
        )
    ).eval()  # fmt: skip
    fill(theirs, 3)
    ours = Siglip(SiglipConfig(image_size=28, patch_size=14, dim=144, mlp_dim=96, num_layers=2)).eval()
    state = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    pixels = input_tensor("pixels", (1, 3, 28, 28), 3, 1.0)
    assert_golden(ours.encode(pixels), theirs(pixel_values=pixels).last_hidden_state, 1e-5)


# --- tokenizer -------------------------------------------------------------------------------------

PROMPTS = ["A photo of a cat", "it's 2 CATS,\n  really!!", "Grüße <|endoftext|> x", "", "ab " * 100]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clip_tokens_equal_transformers(tmp_path: Path, prompt: str) -> None:
    from transformers import CLIPTokenizer

    folder = clip_tables(tmp_path / "tokenizer")
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    theirs = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    ours = ClipTokenizer.from_path(folder)
    want = theirs(prompt, truncation=True, max_length=77)["input_ids"]
    assert list(ours.encode(prompt).ids) == want
    theirs._tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert list(ClipTokenizer.from_path(tmp_path / "tokenizer.json").encode(prompt).ids) == want


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    tokens = ClipTokenizer.from_path(clip_tables(tmp_path)).encode("ab " * 100)
    assert (len(tokens.ids), tokens.cut) == (77, 25)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="holds no CLIP tokenizer"):
        ClipTokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        ClipTokenizer.from_path(tmp_path)
