"""A picture of one model becomes the first frame of another's video: planned before anything runs, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.chain import plan_chain, run_chain, then_fields
from kinema.engine import Engine
from kinema.errors import Cancelled, RequestError
from kinema.media.metadata import read_metadata
from kinema.schema import Plan, Request, Result, Settings
from tiny_world import TinyWorld


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, flux_world: TinyWorld, tiny_world: TinyWorld) -> Settings:
    """Small FLUX models beside small Wan models."""
    flux, wan = flux_world.settings, tiny_world.settings
    merged = tmp_path_factory.mktemp("catalog") / "flux.toml"
    text = flux.catalogs[0].read_text()
    merged.write_text(text)
    return Settings(models=(*flux.models, *wan.models), catalogs=(merged, *wan.catalogs))


def request(save: Path, **fields: object) -> Request:
    return Request.model_validate({"prompt": "a red cat", "model": "tiny-flux", "save": save, "seed": 3, **fields})


def test_a_picture_becomes_a_video(both: Settings, tmp_path: Path) -> None:
    with Engine(both) as engine:
        wanted = then_fields("tiny-clip two small squares --f 9 --d 5")
        chain = plan_chain(engine, request(tmp_path / "cat.png", count=2), wanted)
        assert not list(tmp_path.iterdir()), "planned, not run"
        assert [plan.prompt for plan in chain.videos] == ["two small squares"] * 2
        assert [plan.frames for plan in chain.videos] == [9, 9]
        happened = list(run_chain(engine, chain))
        results = [event for event in happened if isinstance(event, Result)]
    assert [len(result.paths) for result in results] == [1, 1, 1, 1]
    pictures, videos = [result.paths[0] for result in results[:2]], [result.paths[0] for result in results[2:]]
    assert {path.suffix for path in pictures} == {".png"} and {path.suffix for path in videos} == {".mp4"}
    for picture, video in zip(pictures, videos, strict=True):
        plan = Plan.model_validate_json(read_metadata(video)["kinema"])
        assert [image.path for image in plan.images] == [picture]
        assert plan.seeds == (5,)
        for path in (picture, video):
            beside = Plan.model_validate_json(path.with_suffix(".json").read_text())
            assert beside.output.paths == ((path,),), "the plan beside each is its own"


def test_a_video_takes_the_name_of_its_picture_and_the_kind_asked_for(both: Settings, tmp_path: Path) -> None:
    with Engine(both) as engine:
        chain = plan_chain(engine, request(tmp_path / "cat.png"), {"model": "tiny-clip", "frames": 5, "output": "webm"})
    assert chain.videos[0].output.paths == ((tmp_path / "cat-video.webm",),)


def test_no_video_is_written_over_another(both: Settings, tmp_path: Path) -> None:
    """Two pictures, and of each a video of one prompt and one seed: one name."""
    then = {"model": "tiny-clip", "frames": 5, "prompt": "two", "seed": 5}
    with Engine(both) as engine, pytest.raises(RequestError, match=r"two-5\.mp4 would be written 2 times"):
        plan_chain(engine, request(tmp_path / "a.png", count=2), then | {"save": str(tmp_path)})
    with Engine(both) as engine, pytest.raises(RequestError, match=r"x\.mp4 would be written 2 times"):
        overwriting = request(tmp_path / "a.png", count=2, overwrite=True)
        plan_chain(engine, overwriting, then | {"save": str(tmp_path / "x.mp4")})


def test_one_model_at_a_time(both: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the video's first model is loaded, none of the picture's is left."""
    import kinema.residents as residents

    loaded: list[tuple[str, int]] = []
    original = residents.load

    with Engine(both) as engine:

        def load(ref, *args):  # type: ignore[no-untyped-def]
            loaded.append((ref.component, len(engine._models._modules)))
            return original(ref, *args)

        monkeypatch.setattr(residents, "load", load)
        chain = plan_chain(engine, request(tmp_path / "a.png"), {"model": "tiny-clip", "frames": 5})
        list(run_chain(engine, chain))
    first_of_wan = next(index for index, (component, _) in enumerate(loaded) if component == "text_encoder")
    assert {component for component, _ in loaded[:first_of_wan]} == {"t5", "clip_text", "flux_dit", "flux_vae"}
    assert loaded[first_of_wan][1] == 0


def test_a_video_that_is_stopped_says_how_to_make_it_of_its_picture(both: Settings, tmp_path: Path) -> None:
    save = tmp_path / "a cat.png"
    with Engine(both) as engine, pytest.raises(Cancelled) as caught:
        chain = plan_chain(engine, request(save), then_fields("tiny-clip --f 5"))
        list(run_chain(engine, chain, save.exists))
    words = "kinema generate 'a red cat' --model tiny-clip --first"
    assert f"{words} '{save}'" in caught.value.hint and "options of --then" in caught.value.hint


@pytest.mark.parametrize(
    ("then", "fields", "words"),
    [
        ("", {}, "names no model"),
        ("--f 81", {}, "names no model"),
        ("tiny-clip --i other.png", {}, "the first frame is the picture made before"),
        ("tiny-t2v", {}, "takes no first"),
        ("tiny-clip --f 10", {}, "4n"),
        ("tiny-clip", {"model": "tiny-t2v", "frames": 5, "save": "x.mp4"}, "goes on from a picture"),
        ("tiny-clip --nonsense 3", {}, "unknown option --nonsense"),
    ],
)
def test_what_cannot_follow_is_refused_before_anything_runs(
    both: Settings, tmp_path: Path, then: str, fields: dict[str, object], words: str
) -> None:
    fields = dict(fields)
    save = tmp_path / str(fields.pop("save", "a.png"))
    with Engine(both) as engine, pytest.raises(RequestError, match=words):
        plan_chain(engine, request(save, **fields), then_fields(then))
    assert not list(tmp_path.iterdir())
