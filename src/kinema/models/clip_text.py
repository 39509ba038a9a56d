"""CLIP's text tower (CLIP-L) and its tokenizer: one pooled vector of a prompt, for FLUX.1.

Parameter names are those of the transformers files without `text_model.`. Knows nothing of checkpoints.

Source: openai/CLIP clip/model.py (MIT); huggingface/transformers CLIPTextModel, CLIPTokenizer (Apache-2.0).
Parity: tests/parity/test_flux_encoders.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kinema.errors import CatalogError, CheckpointError
from kinema.models.clip_layers import Tower, quick_gelu
from kinema.models.layers import LayerNorm
from kinema.models.tokenizer import Tokens

if TYPE_CHECKING:
    import tokenizers

HEAD_DIM = 64
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_SOURCE = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class ClipTextConfig:
    """Structure of a CLIP text tower; CLIP-L is (49408, 77, 768, 3072, 12)."""

    vocab: int
    num_positions: int
    dim: int
    mlp_dim: int
    num_layers: int
    eps: float = 1e-5


class Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.position_embedding = nn.Embedding(config.num_positions, config.dim)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.token_embedding(ids_BS).float()
        return x_BSD + self.position_embedding.weight[: ids_BS.shape[1]].float()


class ClipText(nn.Module):
    """Token ids to one vector: the last layer's row of the first end token, after the final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Tower(
            config.num_layers,
            config.dim,
            config.mlp_dim,
            config.dim // HEAD_DIM,
            eps=config.eps,
            activation=quick_gelu,
            causal=True,
        )
        self.final_layer_norm = LayerNorm(config.dim, config.eps)

    @torch.no_grad()
    def encode(self, ids: tuple[int, ...]) -> Tensor:
        """Return pooled_1D, float32, of one prompt's ids, the start token first and the end token last.

        Attention is causal: padding behind the end token would change nothing, and is left out.
        """
        x_BSD = self.embeddings(torch.tensor([ids], device=self.embeddings.token_embedding.weight.device))
        pooled_BD: Tensor = self.final_layer_norm(self.encoder(x_BSD)[:, ids.index(ids[-1])])
        return pooled_BD


class ClipTokenizer:
    """CLIP's byte-pair tokenizer: lower case, at most 77 tokens with start and end."""

    def __init__(self, model: tokenizers.Tokenizer, name: str) -> None:
        start, end = model.token_to_id(START), model.token_to_id(END)
        if start is None or end is None:
            raise CheckpointError(f"{name} is not CLIP's tokenizer: it lacks {START} or {END}", path=name)
        model.no_truncation()
        model.no_padding()
        self._model, self._start, self._end = model, start, end

    @classmethod
    def from_path(cls, path: Path | str) -> ClipTokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt beside it, or a folder with either."""
        import tokenizers

        path = Path(path)
        folder = path if path.is_dir() else path.parent
        whole = folder / "tokenizer.json" if path.is_dir() or path.name == "vocab.json" else path
        try:
            if whole.is_file() and path.name != "vocab.json":
                return cls(tokenizers.Tokenizer.from_file(str(whole)), str(whole))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_byte_pairs(folder / "vocab.json", folder / "merges.txt"), str(folder))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}", path=str(path)) from error
        raise CatalogError(
            f"{path} holds no CLIP tokenizer: neither tokenizer.json nor vocab.json with merges.txt",
            f"get the folder `tokenizer` of FLUX.1, or {TOKENIZER_SOURCE}, and pass --clip-tokenizer PATH",
            name=TOKENIZER_SOURCE,
        )

    def encode(self, prompt: str, text_len: int = 77) -> Tokens:
        """Return at most text_len ids, start first and end last, and how many tokens had to be cut."""
        ids = list(self._model.encode(prompt, add_special_tokens=False).ids)
        kept = ids[: text_len - 2]
        return Tokens((self._start, *kept, self._end), len(ids) - len(kept))


def _byte_pairs(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """The tokenizer of OpenAI's two files, which hold its tables but not how text is split."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    lines = [line for line in merges.read_text("utf-8").splitlines() if line and not line.startswith("#version")]
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines)]
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab=json.loads(vocab.read_text("utf-8")),
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=END,
        )
    )
    whitespace = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([normalizers.NFC(), whitespace, normalizers.Lowercase()])
    words = (START, END, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    pattern = "|".join([*(word.replace("|", r"\|") for word in words), r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"])
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens([START, END])
    return model
