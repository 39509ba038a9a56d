"""Prompt lines: what is written comes back, prose stays prose, and nothing unknown passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.batch.lines import SHORT_NAMES, parse_line
from kinema.errors import RequestError
from kinema.request import REPEATED, make_request
from kinema.schema import Request, flag

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
PROSE = st.lists(
    st.sampled_from(
        ["cat's", "--", "--w", "--seed", '"', "'", "\\", '\\"', "a", '5"', "-", "#", "“so”", " ", "=", "--n=x"]
    ),
    min_size=1,
    max_size=12,
).map(" ".join)
PATHS = TEXT.filter(lambda text: "\0" not in text).map(Path).filter(lambda path: str(path) != ".")
REQUESTS = st.builds(
    Request,
    prompt=st.none() | TEXT | PROSE,
    negative=st.none() | st.just("") | TEXT | PROSE,
    model=st.none() | TEXT,
    first=st.none() | PATHS,
    reference=st.lists(PATHS, max_size=3).map(tuple),
    control_image=st.lists(PATHS, max_size=2).map(tuple),
    one_frame=st.none() | st.just("target_index=1,control_index=0"),
    size=st.none() | st.sampled_from(["832x480", "480p"]),
    frames=st.none() | st.integers(1, 1000),
    seconds=st.none() | st.floats(0.01, 100),
    seed=st.none() | st.integers(0, 2**63 - 1),
    seeds=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
    guidance_high=st.none() | st.floats(0, 50),
    solver=st.none() | st.sampled_from(["unipc", "dpmpp", "euler"]),
    output=st.lists(st.sampled_from(["mp4", "gif", "latents"]), unique=True).map(tuple),
    save=st.none() | PATHS,
    overwrite=st.booleans(),
)


def render_line(request: Request) -> str:
    """Return the line that parse_line reads back as this request."""
    words = [] if request.prompt is None else [quoted(request.prompt)]
    for name in Request.model_fields:
        value = getattr(request, name)
        if name == "prompt" or name not in request.model_fields_set or value is None or value == ():
            continue
        if name in REPEATED:
            words += [f"{flag(name)} {quoted(str(item))}" for item in value]
        elif isinstance(value, tuple):
            words.append(f"{flag(name)} {','.join(map(str, value))}")
        else:
            words.append(f"{flag(name)} {quoted(str(value))}")
    return " ".join(words)


def quoted(text: str) -> str:
    plain = (
        text and text[0] not in "\"'#-" and text == text.strip() and '"' not in text and not re.search(r"\s--", text)
    )
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(REQUESTS)
@settings(max_examples=300, deadline=None)
def test_a_rendered_request_reads_back(request_: Request):
    assert make_request(parse_line(render_line(request_))).model_dump() == request_.model_dump()


def test_the_example_of_the_documents():
    line = 'A cat walks. --w 832 --h 480 --f 81 --d 42 --s 20 --n "blurry, --grey" --l 5 --i image.png'
    assert parse_line(line) == {
        "prompt": "A cat walks.",
        "size": "832x480",
        "frames": "81",
        "seed": "42",
        "steps": "20",
        "negative": "blurry, --grey",
        "guidance": "5",
        "first": "image.png",
    }


SHORT_CASES = {
    "w": ("--w 832 --h 480", "size", "832x480"),
    "h": ("--h 480 --w 832", "size", "832x480"),
    "f": ("--f 81", "frames", "81"),
    "d": ("--d 42", "seed", "42"),
    "s": ("--s 20", "steps", "20"),
    "g": ("--g 6.5", "guidance", "6.5"),
    "l": ("--l 5", "guidance", "5"),
    "fs": ("--fs 12", "shift", "12"),
    "i": ("--i a b.png", "first", "a b.png"),
    "ei": ("--ei e.png", "last", "e.png"),
    "cn": ("--cn c.mp4", "control", "c.mp4"),
    "n": ("--n ugly hands", "negative", "ugly hands"),
    "ci": ("--ci a.png --ci b.png", "control_image", ("a.png", "b.png")),
    "cim": ("--cim m.png", "control_mask", ("m.png",)),
    "of": ("--of target_index=1,control_index=0", "one_frame", "target_index=1,control_index=0"),
    "image": ("--image a.png", "first", "a.png"),
}


def test_every_short_name_has_a_case():
    assert SHORT_CASES.keys() == SHORT_NAMES.keys()


@pytest.mark.parametrize("short", SHORT_CASES)
def test_short_names(short: str):
    options, field, value = SHORT_CASES[short]
    assert parse_line(f"A cat {options}") == {"prompt": "A cat", field: value}


@pytest.mark.parametrize("field", Request.model_fields)
def test_every_field_has_its_long_name(field: str):
    if field == "prompt":
        assert parse_line("--prompt a cat") == {"prompt": "a cat"}
        return
    option = "--" + field.replace("_", "-")
    fields = parse_line(f"A cat {option} 7")
    assert fields.pop("prompt") == "A cat"
    assert list(fields) == [field] and fields[field] in ("7", ("7",))


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("the cat's paw --s 3", {"prompt": "the cat's paw", "steps": "3"}),
        (
            "the cats' paws and the dog's tail --n it's grey",
            {"prompt": "the cats' paws and the dog's tail", "negative": "it's grey"},
        ),
        ("'Twas night --s 3", {"prompt": "'Twas night", "steps": "3"}),
        ('a sign reading "sale --now" glows --s 3', {"prompt": 'a sign reading "sale --now" glows', "steps": "3"}),
        ('"Hello" says the cat --s 3', {"prompt": '"Hello" says the cat', "steps": "3"}),
        ('"A cat --walks" --s 3', {"prompt": "A cat --walks", "steps": "3"}),
        (
            'a 5" pipe and a 6" pipe --n "bad --x" --s 3',
            {"prompt": 'a 5" pipe and a 6" pipe', "negative": "bad --x", "steps": "3"},
        ),
        ("a cat -- grey -- walks --s 3", {"prompt": "a cat -- grey -- walks", "steps": "3"}),
        ("a well-lit - bright - room --s=3", {"prompt": "a well-lit - bright - room", "steps": "3"}),
        (r'x --n "he said \"no\" \\ twice"', {"prompt": "x", "negative": r'he said "no" \ twice'}),
        (r'x --i "C:\new\image.png"', {"prompt": "x", "first": r"C:\new\image.png"}),
        ("x --n 'grey, --flat'", {"prompt": "x", "negative": "grey, --flat"}),
        ('x --n ""', {"prompt": "x", "negative": ""}),
        ("x --overwrite --s 3", {"prompt": "x", "overwrite": True, "steps": "3"}),
        ("x --overwrite false", {"prompt": "x", "overwrite": "false"}),
        ("x --guidance_high 4", {"prompt": "x", "guidance_high": "4"}),
        ("一只猫 --s 3", {"prompt": "一只猫", "steps": "3"}),
        ("--s 3", {"steps": "3"}),
    ],
)
def test_prose_and_quotes(line: str, fields: dict[str, object]):
    assert parse_line(line) == fields


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a cat --stepz 3", "--stepz; did you mean --steps?".replace("; ", ".*")),
        ("a cat --walking slowly", "unknown option --walking"),
        ("a cat --w832 --h 480", "unknown option --w832"),
        ("a cat --s", "--s has no value"),
        ("a cat --s --f 81", "--s has no value"),
        ("a cat --s 3 --steps 4", "gives steps twice; it was 3"),
        ("a cat --g 3 --l 4", "gives guidance twice; it was 3"),
        ("a cat --i a.png --first b.png", "gives first twice; it was a.png"),
        ("a cat --w 832", "--w 832 says one side only"),
        ("a cat --w 832 --h 480 --size 480p", "both say the size"),
        ('a cat --n "blurry, grey --s 3', "never closed"),
        ('"a cat --s 3', "never closed"),
        ("a cat --s: 3", "cannot read ': 3'"),
    ],
)
def test_faults_of_a_line(line: str, words: str):
    with pytest.raises(RequestError) as caught:
        parse_line(line)
    assert re.search(words, caught.value.message), caught.value.message
    assert caught.value.hint


def test_one_side_keeps_the_other_of_the_default():
    assert parse_line("x --w 640", {"size": "832x480"})["size"] == "640x480"
    assert parse_line("x --h 640", {"size": "832x480"})["size"] == "832x640"
