"""The tokenizer against transformers and tokenizers, on sentencepiece models trained here."""

from __future__ import annotations

import io
from functools import cache

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import T5Tokenizer

from kinema.errors import CatalogError, CheckpointError
from kinema.models.tokenizer import Tokenizer, clean

SENTENCE = "a red cat walks over the green hill while two small blue dogs look up at the sky slowly; it's raining!"
WORDS = SENTENCE.split()
CORPUS = [
    *(" ".join(WORDS[i % 20] for i in range(start, start * 5 + 9, 1 + start % 3)) for start in range(200)),
    *["一只猫在雨中走过红色的桥", "猫和狗在看天空", "Ein größeres Haus, Straße"] * 5,
    *["кошка идёт под дождём", "가나다 고양이"] * 5,
]

PROMPTS = [
    "",
    "a",
    "  A red cat   walks\n\tslowly  ",
    "Two blue dogs look up, at the sky; it's raining!",
    "一只猫在雨中走过红色的桥。",
    "一只 red 猫,在雨中！！",
    "größeres Haus",
    "gro\u0308ßeres Haus",
    "ＦＵＬＬ ｗｉｄｔｈ　ｓｐａｃｅ",
    "cat 🐈 and dog 🐕‍🦺 👍🏽",
    "the &amp;lt;cat&amp;gt; &quot;sky&quot; &eacute;",
    "donâ€™t look",
    "“curly” quotes… – dash",
    "кошка идёт под дождём",
    "고양이 가나다",
    "zero\u200bwidth and nb\u00a0space",
    "x" * 300,
    "١٢٣ ① ½ ﬁne",
    "<cat> </dog> <extra> <extra_id_> <extra_id_300>",
    "\ufeffbom",
]
SPECIAL_PROMPTS = [
    "a cat</s>walks",
    "a cat </s> walks",
    "</s>",
    "<pad><pad> a",
    "a <extra_id_0> cat <extra_id_299>",
    "the sky <extra_id_17>",
    "<unk> dog <s> cat",
    "<extra_id_07> cat <extra_id_1> <extra_id_2>",
]


@cache
def train(**ids: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=260,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        num_threads=1,
        **ids,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def umt5_model() -> bytes:
    """The special ids of umT5: <pad> 0, </s> 1, <s> 2, <unk> 3."""
    return train(pad_id=0, eos_id=1, bos_id=2, unk_id=3)


@pytest.fixture(scope="module")
def umt5_json(umt5_model) -> tokenizers.Tokenizer:
    """The pipeline of google/umt5-xxl's tokenizer.json, as transformers writes it from a sentencepiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(umt5_model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    extra = [f"<extra_id_{i}>" for i in range(299, -1, -1)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces + [(token, 0.0) for token in extra], unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<pad>", "</s>", "<s>", "<unk>", *extra)]
    )
    return tokenizer


def test_ids_match_transformers(tmp_path):
    """transformers 5 fixes <unk> at 2, so this compares on the special ids of the first T5."""
    spiece = train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(spiece)
    theirs = T5Tokenizer.from_pretrained(tmp_path, extra_ids=300)
    ours = Tokenizer.from_bytes(spiece)
    unlike = [p for p in PROMPTS if list(ours.encode(p, 4096).ids) != theirs(clean(p)).input_ids]
    assert not unlike
    assert len({ours.encode(p).ids for p in PROMPTS}) == len(PROMPTS) - 1  # one pair is equal after NFKC


def test_t5_takes_a_prompt_as_it_stands(tmp_path):
    spiece = train(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (tmp_path / "spiece.model").write_bytes(spiece)
    theirs = T5Tokenizer.from_pretrained(tmp_path, extra_ids=300)
    ours = Tokenizer.from_bytes(spiece)
    ours.cleans = False
    for prompt in ["a red cat ", "  a red cat\n", "the &amp; sky", "“curly”  quotes "]:
        assert list(ours.encode(prompt).ids) == theirs(prompt).input_ids, prompt


def test_special_tokens_in_a_prompt_match_the_official_tokenizer(umt5_model, umt5_json):
    ours = Tokenizer.from_bytes(umt5_model)
    for prompt in SPECIAL_PROMPTS + [p for p in PROMPTS if "\u200b" not in p]:
        want = umt5_json.encode(clean(prompt), add_special_tokens=False).ids
        assert list(ours.encode(prompt, 4096).ids) == [*want, 1], prompt
    size = sentencepiece.SentencePieceProcessor(model_proto=umt5_model).vocab_size()
    assert ours.encode("<extra_id_0>").ids == (size + 299, 1)  # of umT5-XXL's 256000 pieces: 256299
    assert ours.encode("</s>").ids == (1, 1)


def test_every_form_of_the_tokenizer_gives_the_same_ids(tmp_path, umt5_model, umt5_json):
    (tmp_path / "spiece.model").write_bytes(umt5_model)
    only_spiece = Tokenizer.from_path(tmp_path)
    umt5_json.enable_truncation(5)
    umt5_json.enable_padding(length=9)
    umt5_json.save(str(tmp_path / "tokenizer.json"))
    umt5_json.no_truncation()
    umt5_json.no_padding()
    forms = [
        only_spiece,
        Tokenizer.from_path(tmp_path),
        Tokenizer.from_path(tmp_path / "tokenizer.json"),
        Tokenizer.from_path(str(tmp_path / "spiece.model")),
    ]
    for prompt in ["a red cat walks over the green hill", "一只猫", "", "a </s> b"]:
        assert len({form.encode(prompt) for form in forms}) == 1, prompt


def test_a_folder_with_both_uses_tokenizer_json(tmp_path, umt5_model, umt5_json):
    (tmp_path / "spiece.model").write_bytes(b"broken")
    umt5_json.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_path(tmp_path).encode("cat") == Tokenizer.from_bytes(umt5_model).encode("cat")


def test_long_prompts_are_cut_and_counted(umt5_model):
    tokenizer = Tokenizer.from_bytes(umt5_model)
    whole = tokenizer.encode("cat dog " * 40, 4096)
    assert whole.cut == 0 and whole.ids[-1] == 1
    n = len(whole.ids)
    assert tokenizer.encode("cat dog " * 40, n) == whole
    cut = tokenizer.encode("cat dog " * 40, n - 3)
    assert cut.cut == 3 and cut.ids == (*whole.ids[: n - 4], 1)


@pytest.mark.parametrize(
    "prompt, want",
    [
        ("  a \n\t b  ", "a b"),
        ("a &amp;amp; b", "a & b"),
        ("&lt;b&gt;", "<b>"),
        ("donâ€™t", "don't"),
        ("“a”", '"a"'),
        ("ﬁne", "fine"),
        ("全角　空白", "全角 空白"),
        ("猫 🐈", "猫 🐈"),
        ("&amp;nbsp;a&nbsp;b&nbsp;", "a b"),
    ],
)
def test_cleaning(prompt, want):
    assert clean(prompt) == want


def test_a_missing_tokenizer_is_named_with_its_source(tmp_path):
    for path in (tmp_path, tmp_path / "spiece.model"):
        with pytest.raises(CatalogError, match="google/umt5-xxl") as caught:
            Tokenizer.from_path(path)
        assert str(tmp_path) in caught.value.message and "--tokenizer" in caught.value.hint


def test_a_broken_tokenizer_is_an_error(tmp_path, umt5_model):
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        Tokenizer.from_bytes(umt5_model[: len(umt5_model) // 2])
    with pytest.raises(CheckpointError, match="</s>"):
        Tokenizer.from_bytes(train(pad_id=0, eos_id=-1, bos_id=-1, unk_id=1))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_path(tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="</s>"):
        Tokenizer.from_path(tmp_path)
