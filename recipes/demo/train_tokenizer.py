"""Train the demo model's own sentencepiece tokenizer on the captions.

    python recipes/demo/train_tokenizer.py

Writes runs/demo/spiece.model in seconds. Every word of the grammar becomes one token; letters cover the rest.
"""

from __future__ import annotations

import io
import string

import data
import numpy as np
import sentencepiece
from train_vae import RUNS

VOCAB = 256


def captions(count: int) -> list[str]:
    """Captions of all scenes: that a word exists is not what is held out."""
    rng = np.random.default_rng(0)
    scenes = (data.random_scene(rng, "train", 1 + seed % 2) for seed in range(count))
    return [data.caption(scene, rng) for scene in scenes]


def main() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions(4000)),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        required_chars=string.ascii_letters + string.digits + ".,!?'-",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",  # "A Red circle" reads as "a red circle"
        minloglevel=2,
    )
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "spiece.model").write_bytes(model.getvalue())
    tokens = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    longest = max(captions(500), key=len)
    print(tokens.vocab_size(), "pieces;", tokens.encode(longest, out_type=str))


if __name__ == "__main__":
    main()
