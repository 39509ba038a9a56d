"""Commands of the documents, planned for the real models: what is printed can be pasted, with files of one's own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kinema.planning import MEDIA_FIELDS, make_plan
from kinema.planning.camera import is_pose_file
from kinema.planning.inputs import split_place
from kinema.request import REPEATED, make_request
from kinema.schema import Facts, MediaFacts, Request
from plan.world import CATALOG, MACHINE, file, files_of, image, sound, video

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_PLANNED = {"--lora", "--from-file", "--interactive", "--then", "--preset"}
"""Flags whose files are looked into before a plan is made, or that make many."""

SWITCHES = {name for name, field in Request.model_fields.items() if field.annotation is bool}
NOT_ASKED = {"models_dir"}
ALIASES = {"o": "save", "image": "first"}


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                if words[1:2] not in (["generate"], ["plan"]) or NOT_PLANNED & set(words):
                    continue
                if "--model" in words and words[words.index("--model") + 1] in set(CATALOG) - {"demo"}:
                    yield page.name, shlex.join(words)


def asked(words: list[str]) -> dict[str, Any]:
    """The fields of a request that the words of a command give."""
    fields: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name = word.lstrip("-").replace("-", "_")
        name = ALIASES.get(name, name)
        if not word.startswith("-"):
            fields["prompt"] = word
        elif name in SWITCHES:
            fields[name] = True
        elif name in REPEATED:
            fields[name] = (*fields.get(name, ()), next(rest))
        elif name != "pull":
            fields[name] = next(rest)
    return {name: value for name, value in fields.items() if name not in NOT_ASKED}


def facts_of(field: str, path: Path) -> MediaFacts:
    """A file as the page that names it means it: half as long as a video of the model, of the model's shape."""
    if field == "camera":
        return MediaFacts(path=path, kind="camera", frames=200)
    if field == "audio":
        return sound(12.0, path.name)
    if path.suffix in (".png", ".jpg"):
        return image(832, 480, path.name)
    return video(frames=41, name=path.name)


def media_of(request: Request) -> dict[str, tuple[MediaFacts, ...]]:
    media: dict[str, tuple[MediaFacts, ...]] = {}
    for field in MEDIA_FIELDS:
        value = getattr(request, field)
        paths = value if isinstance(value, tuple) else (value,) if value else ()
        if field == "camera" and not (value and is_pose_file(value)):
            continue
        if field != "one_frame":
            media[field] = tuple(facts_of(field, split_place(str(path))[0]) for path in paths)
    if request.speech_text:
        media["audio"] = (sound(12.0),)
    return media


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_documented_command_makes_a_plan(page: str, command: str) -> None:
    request = make_request({**asked(shlex.split(command)[2:]), "seed": 1, "device": "cuda"})
    entry = CATALOG[str(request.model)]
    files = {**files_of(entry), "motion_controller": file("m", "motion_controller", {"freq_dim": 256, "dim": 1536})}
    made = make_plan(request, entry, Facts(files=files, media=media_of(request), machine=MACHINE))
    assert made.model == request.model and made.steps


def test_every_wan_model_has_a_command_in_the_documents() -> None:
    named = {word for _, command in commands() for word in shlex.split(command)}
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert {name for name in CATALOG if name not in named and f"`{name}`" not in text and name != "demo"} == set()


def test_a_planted_command_fails() -> None:
    with pytest.raises(Exception, match="takes no camera"):
        test_a_documented_command_makes_a_plan("", "kinema generate x --model wan2.1-t2v-14b --camera static")
