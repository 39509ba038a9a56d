"""The tokenizer inside a T5's GGUF file reads every text as the sentencepiece model it was made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from test_quantised import LLAMA, TEXT_STATE

from kinema.models.tokenizer import Tokenizer
from kinema.weights.convert import convert
from kinema.weights.detect import inspect
from kinema.weights.files import open_tensors
from kinema.weights.load import load_tokenizer
from tiny_world import TEXTS, spiece_model

SPIECE = spiece_model()
WORDS = [*TEXTS, "a  ﬁne   café", "<extra_id_0> cat", "ｆｕｌｌ width", "unknown: 猫", ""]


def write_encoder(path: Path, *, padding: int = 0, charsmap: bool = True) -> Path:
    """Write the tiny umT5 as llama.cpp's converter does, tokenizer included."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(SPIECE)
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("t5")
    filling = [f"[PAD{number}]" for number in range(padding)]
    writer.add_token_list([piece.piece for piece in model.pieces] + filling)
    writer.add_token_scores([piece.score for piece in model.pieces] + [-10000.0] * padding)
    writer.add_token_types([piece.type for piece in model.pieces] + [5] * padding)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    if charsmap:
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.add_eos_token_id(model.trainer_spec.eos_id)
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_pad_token_id(model.trainer_spec.pad_id)
    for name, tensor in TEXT_STATE.items():
        new = name
        for official, llama in LLAMA:
            new = new.replace(official, llama)
        writer.add_tensor("enc.output_norm.weight" if name == "norm.weight" else new, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("padding", [0, 7])
def test_it_reads_what_the_model_reads(tmp_path: Path, padding: int) -> None:
    path = write_encoder(tmp_path / "a.gguf", padding=padding)
    facts = inspect(path)
    assert facts.has_tokenizer and facts.dialect == "gguf"
    found, wanted = load_tokenizer(facts.files, None), Tokenizer.from_bytes(SPIECE)
    assert isinstance(found, Tokenizer)
    for text in WORDS:
        assert found.encode(text) == wanted.encode(text), text
    assert list(convert(path, tmp_path / "b.safetensors", "float32"))
    carried = load_file(tmp_path / "b.safetensors")["spiece_model"]
    again = Tokenizer.from_bytes(bytes(carried.tolist()))
    assert all(again.encode(text) == wanted.encode(text) for text in WORDS)
    assert torch.equal(open_tensors(path).get("enc.output_norm.weight"), TEXT_STATE["norm.weight"])


def test_one_without_its_normaliser_is_none(tmp_path: Path) -> None:
    assert not inspect(write_encoder(tmp_path / "a.gguf", charsmap=False)).has_tokenizer
