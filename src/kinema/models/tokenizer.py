"""The tokenizers of umT5, T5 and CLIP: prompt to token ids, from any form in which their models are published.

Owns cleaning and truncation of prompts. Knows nothing of the encoders; sentencepiece, tokenizers and ftfy are imported
when first needed, so that importing this module costs nothing.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kinema.errors import CatalogError, CheckpointError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_SOURCE = "google/umt5-xxl"
NUM_EXTRA_IDS = 300
SPECIAL = re.compile(r"(</?s>|<pad>|<unk>|<extra_id_(?:[12][0-9]{2}|[1-9]?[0-9])>)")

CLIP_SOURCE = "openai/clip-vit-large-patch14"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


class Tokens(NamedTuple):
    """ids end with the token that ends a text; `cut` counts the tokens that did not fit."""

    ids: tuple[int, ...]
    cut: int


class Tokenizer:
    """umT5 tokenizer: prompt to token ids, cleaned and cut as the official code does. With `cleans` unset T5's, as FLUX
    takes it: the prompt goes to the model as it stands.

    Special tokens written in a prompt (</s>, <s>, <pad>, <unk>, <extra_id_0> to <extra_id_299>) become those tokens, as
    in the official tokenizer; a space before one is a token of its own. A sentencepiece model holds no <extra_id_N>:
    as in transformers they follow the vocabulary in descending order, so that umT5-XXL's <extra_id_0> is 256299.
    Source: Wan-Video/Wan2.2 wan/modules/tokenizers.py (Apache-2.0); huggingface/transformers pull request 22626.
    """

    def __init__(self, pieces: Callable[[str], list[int]], eos: int) -> None:
        self._pieces = pieces
        self._eos = eos
        self.cleans = True

    @classmethod
    def from_bytes(cls, spiece: bytes, name: str = "spiece_model") -> Tokenizer:
        """Read a serialized sentencepiece model, such as the `spiece_model` tensor inside ComfyUI's umT5 files."""
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(spiece)
        except RuntimeError as error:
            raise _not_a_tokenizer(name, "a sentencepiece model") from error
        if model.eos_id() < 0:
            raise _not_a_tokenizer(name, "a sentencepiece model with </s>")
        return cls(_SentencePieces(model), model.eos_id())

    @classmethod
    def from_path(cls, path: Path | str) -> Tokenizer:
        """Read spiece.model, tokenizer.json, or a folder with either; tokenizer.json first, as the official code."""
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "spiece.model") if (path / name).is_file()]
            if not found:
                raise _no_tokenizer(f"{path} holds neither tokenizer.json nor spiece.model", path)
            path = found[0]
        if not path.is_file():
            raise _no_tokenizer(f"{path} does not exist", path)
        if path.suffix != ".json":
            return cls.from_bytes(path.read_bytes(), str(path))

        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _not_a_tokenizer(str(path), "a tokenizer.json") from error
        eos = model.token_to_id("</s>")
        if eos is None:
            raise _not_a_tokenizer(str(path), "a tokenizer.json with </s>")
        model.no_truncation()
        model.no_padding()
        return cls(lambda text: list(model.encode(text, add_special_tokens=False).ids), eos)

    def encode(self, prompt: str, text_len: int = 512) -> Tokens:
        """Return at most text_len ids, the last being </s>, and how many tokens had to be cut."""
        ids = self._pieces(clean(prompt) if self.cleans else prompt)
        cut = max(0, len(ids) - (text_len - 1))
        return Tokens((*ids[: text_len - 1], self._eos), cut)


class _SentencePieces:
    """Token ids of a text by a sentencepiece model, with the special tokens the model itself does not read."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        *before, last = SPECIAL.split(text)
        for words, special in zip(before[::2], before[1::2], strict=True):
            ids += self.model.EncodeAsIds(words)
            if words.endswith(" "):
                ids.append(self.model.PieceToId("▁"))
            ids.append(self._special(special))
        return ids + list(self.model.EncodeAsIds(last))

    def _special(self, token: str) -> int:
        if token.startswith("<extra_id_"):
            return int(self.model.vocab_size()) + NUM_EXTRA_IDS - 1 - int(token[len("<extra_id_") : -1])
        return int(self.model.PieceToId(token))


def clean(prompt: str) -> str:
    """Return the prompt with broken Unicode and HTML entities repaired and whitespace runs made single spaces."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def _no_tokenizer(message: str, path: Path) -> CatalogError:
    hint = (
        f"Get spiece.model or tokenizer.json from the folder {TOKENIZER_SOURCE} of the official model files "
        f"(or huggingface.co/{TOKENIZER_SOURCE}) and pass --tokenizer PATH."
    )
    return CatalogError(f"umT5 tokenizer: {message}", hint, name=TOKENIZER_SOURCE, searched=str(path))


def _not_a_tokenizer(name: str, expected: str) -> CheckpointError:
    hint = f"Replace it with the file of {TOKENIZER_SOURCE}, found beside the official model files."
    return CheckpointError(f"{name} is not {expected}", hint, path=name, expected=expected)


# --- CLIP ------------------------------------------------------------------------------------------


class ClipTokenizer:
    """CLIP's byte-pair tokenizer: lower case, at most 77 tokens with start and end.

    Source: openai/CLIP clip/simple_tokenizer.py (MIT); huggingface/transformers CLIPTokenizer (Apache-2.0).
    """

    def __init__(self, model: tokenizers.Tokenizer, name: str) -> None:
        start, end = model.token_to_id(CLIP_START), model.token_to_id(CLIP_END)
        if start is None or end is None:
            raise CheckpointError(f"{name} is not CLIP's tokenizer: it lacks {CLIP_START} or {CLIP_END}", path=name)
        model.no_truncation()
        model.no_padding()
        self._model, self._start, self._end = model, start, end

    @classmethod
    def from_path(cls, path: Path | str) -> ClipTokenizer:
        """Read tokenizer.json, or vocab.json with merges.txt beside it, or a folder with either."""
        import tokenizers

        path = Path(path)
        folder = path if path.is_dir() else path.parent
        whole = folder / "tokenizer.json" if path.is_dir() else path
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
            f"get the folder `tokenizer` of FLUX.1, or {CLIP_SOURCE}, and pass --clip-tokenizer PATH",
            name=CLIP_SOURCE,
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
            unk_token=CLIP_END,
        )
    )
    whitespace = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([normalizers.NFC(), whitespace, normalizers.Lowercase()])
    words = (CLIP_START, CLIP_END, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    pattern = "|".join([*(word.replace("|", r"\|") for word in words), r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"])
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens([CLIP_START, CLIP_END])
    return model
