"""One model's pictures as the next one's first frames: all of it planned before anything runs, one model at a time.

Owns how two requests hang together. Each is planned and run by the engine as it would be alone.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kinema.batch.lines import parse_line
from kinema.endings import hinted
from kinema.engine import Engine
from kinema.errors import KinemaError, RequestError
from kinema.planning.outputs import sidecars
from kinema.request import make_request
from kinema.schema import Event, MediaFacts, Plan, Request

INHERITED = ("prompt", "device", "precision", "overwrite")
"""Fields of the first request that the second one has where it does not name its own."""


class Chain(NamedTuple):
    """The plan of the pictures, and that of each video, in the order of the pictures."""

    pictures: Plan
    videos: tuple[Plan, ...]


def plan_chain(engine: Engine, request: Request, fields: Mapping[str, Any]) -> Chain:
    """Plan `request`, and then one more of these `fields` from each picture it will have written.

    Where the picture is named, NAME.png, so is its video: NAME-video.mp4, each with its plan beside it.
    Raises what planning raises, and RequestError for a first request that writes no picture, a second one that already
    has its first frame, and where one would write over what the other wrote.
    """
    pictures = engine.plan(request)
    if fields.get("first"):
        raise RequestError(
            f"first {fields['first']} and --then: the first frame is the picture made before",
            "leave out --first",
            field="first",
            got=str(fields["first"]),
        )
    if pictures.frames > 1 or "png" not in pictures.output.kinds:
        raise RequestError(
            f"{pictures.model} writes {', '.join(pictures.output.kinds)}: --then goes on from a picture",
            "take an image model such as flux.1-dev, or pass --frames 1 --output png",
            field="then",
            got=fields.get("model"),
        )
    inherited = {name: getattr(request, name) for name in INHERITED if getattr(request, name) is not None}
    place = pictures.output.kinds.index("png")
    videos = []
    for paths in pictures.output.paths:
        picture = paths[place]
        promised = MediaFacts(path=picture, kind="image", width=pictures.width, height=pictures.height)
        video = make_request({**inherited, **fields, "first": picture})
        if request.save is not None and video.save is None:
            kind = next(iter(video.output), "mp4")
            suffix = "safetensors" if kind == "latents" else kind
            video = video.model_copy(update={"save": picture.with_name(f"{picture.stem}-video.{suffix}")})
        videos.append(engine.plan(video, promised={picture: promised}))
    _refuse_shared_files(pictures, *videos)
    return Chain(pictures, tuple(videos))


def _refuse_shared_files(*plans: Plan) -> None:
    """Each plan keeps clear of the files that are there; none knows of those that the others will write."""
    outputs = [(plan.output, paths) for plan in plans for paths in plan.output.paths]
    files = Counter(file for output, paths in outputs for file in (*paths, *sidecars(paths, output.strip)))
    file, times = files.most_common(1)[0]
    if times > 1:
        raise RequestError(
            f"{file} would be written {times} times in one run",
            "pass another --seed or --save in --then",
            field="then",
            got=str(file),
        )


def run_chain(engine: Engine, chain: Chain, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
    """Yield what happens: the pictures first, then, with their models gone from memory, the videos.

    Raises what a run raises; of a video with what to type to make it of its picture, which stays.
    """
    yield from engine.run(chain.pictures, cancelled=cancelled)
    engine.release()
    for plan in chain.videos:
        try:
            yield from engine.run(plan, cancelled=cancelled)
        except KinemaError as error:
            words = ("kinema", "generate", plan.prompt, "--model", plan.model, "--first", str(plan.request.first))
            hint = f"the picture is made; for its video alone: {shlex.join(words)}, with the other options of --then"
            raise hinted(error, hint) from error


def then_fields(text: str) -> dict[str, Any]:
    """Return the fields of `MODEL [PROMPT] [--options]`, of which all but the model is a prompt line.

    Raises RequestError where there is no name, and what reading a line raises.
    """
    model, _, rest = text.strip().partition(" ")
    if not model or model.startswith("--"):
        raise RequestError(
            f"then {text!r} names no model",
            'pass --then "MODEL", or with options: --then "wan2.2-i2v-a14b the fox runs --f 81"',
            field="then",
            got=text,
        )
    return {**(parse_line(rest) if rest.strip() else {}), "model": model}
