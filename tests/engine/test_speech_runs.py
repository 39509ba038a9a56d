"""Speech to video from request to file: clip by clip, in time with its sound, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import pytest
import torch

from kinema import ops
from kinema.engine import Engine
from kinema.errors import Cancelled, CheckpointError, MachineError, OutputError, RequestError
from kinema.media.audio import read_audio
from kinema.media.metadata import read_metadata
from kinema.media.reader import read_video
from kinema.schema import Note, Plan, Progress, Request, Result, Settings
from sounds import clicks_in
from speech_world import CLICKS, inputs
from tiny_world import TinyWorld

FRAMES = [5, 8, 8]  # 1.5 s are 24 frames in 3 clips of 8, of which the first 3 are left out


@pytest.fixture(scope="module")
def settings(speech_settings: Settings) -> Settings:
    return speech_settings


@pytest.fixture
def ask(tmp_path: Path):
    def request(**fields: object) -> Request:
        given = {"model": "tiny-s2v", "prompt": "a cat walks", "seed": 3, "save": tmp_path / "out.mp4", "device": "cpu"}
        return Request(**{**given, "precision": "reference", **inputs(tmp_path), **fields})

    return request


def voice(folder: Path, seconds: float) -> Path:
    """A sound of another length."""
    (folder / "other").mkdir()
    return inputs(folder / "other", seconds)["audio"]


def finish(engine: Engine, request: Request) -> Result:
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return result


def pixels(path: Path) -> torch.Tensor:
    return torch.stack(list(read_video(path))).float()


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One run of three clips, for several tests to look at."""
    folder = tmp_path_factory.mktemp("whole")
    given = inputs(folder)
    request = Request(
        model="tiny-s2v", prompt="a cat walks", seed=3, save=folder / "out.mp4", device="cpu",
        precision="reference", output="mp4,latents", **given,
    )  # fmt: skip
    return finish(engine, request)


def test_three_clips_make_one_video_with_its_sound(whole: Result):
    path = whole.paths[0]
    assert [clip.shown for clip in whole.plan.clips] == FRAMES
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == sum(FRAMES) == whole.plan.frames
    assert Plan.model_validate(json.loads(read_metadata(path)["kinema"])).clips == whole.plan.clips
    assert not list(path.parent.glob("*.clips"))
    assert whole.plan.speech is not None and whole.plan.speech.audio in {Path(name) for name in whole.plan.hashes}


def test_a_click_is_heard_at_its_frame(whole: Result):
    """Frame k shows what the model heard as frame k + 3: the sound loses the same 3 / 16 s."""
    lost = whole.plan.clips[0].skip / whole.plan.fps
    assert lost == 3 / 16 and whole.plan.sound is not None and whole.plan.sound.start == lost
    heard = clicks_in(read_audio(whole.paths[0]), len(CLICKS))
    assert heard == pytest.approx([click - lost for click in CLICKS], abs=0.003)
    frame_of = [int(click * 16) - 3 for click in CLICKS]
    assert [int(time * 16 + 0.05) for time in heard] == frame_of


def test_clips_differ_and_join_in_order(engine: Engine, ask, whole: Result, tmp_path: Path):
    """Decoding the latents again, clip after clip, gives the same frames as the run did."""
    (result,) = (
        e for e in engine.decode(whole.paths[1], Request(save=tmp_path / "again.mp4")) if isinstance(e, Result)
    )
    assert torch.equal(pixels(result.paths[0]), pixels(whole.paths[0]))
    latents, plan = ops.read_latents(whole.paths[1])
    parts = latents.split(plan.latent[1], dim=1)
    assert len(parts) == 3 and not torch.equal(parts[0], parts[1])


def test_progress_runs_over_all_clips(settings: Settings, ask):
    with Engine(settings) as engine:  # with nothing loaded yet
        plan = engine.plan(ask())
        events = list(engine.run(plan))
    sampled = [event.done for event in events if isinstance(event, Progress) and event.stage == "sample"]
    assert sampled[-1] == 3 * len(plan.steps) and sampled == sorted(sampled)
    assert {event.total for event in events if isinstance(event, Progress) and event.stage == "sample"} == {6}
    written = [event.done for event in events if isinstance(event, Progress) and event.stage == "decode"]
    assert written[-1] == sum(FRAMES)
    first_written = next(i for i, e in enumerate(events) if isinstance(e, Progress) and e.stage == "decode" and e.done)
    assert any(isinstance(e, Progress) and e.stage == "sample" for e in events[first_written:]), "frames come as made"


def test_start_from_the_reference_keeps_every_frame(engine: Engine, ask):
    plan = engine.plan(ask(start_from_reference=True))
    assert [clip.shown for clip in plan.clips] == [8, 8, 8] and plan.sound is not None and plan.sound.start == 0
    result = next(event for event in engine.run(plan) if isinstance(event, Result))
    assert clicks_in(read_audio(result.paths[0]), len(CLICKS)) == pytest.approx(CLICKS, abs=0.003)


def test_fewer_clips_are_made_when_asked(engine: Engine, ask):
    plan = engine.plan(ask(clips=1))
    assert plan.frames == 5
    assert any("the first 1 of 3 clips" in note.text for note in plan.notes)


def test_a_pose_video_changes_the_result(engine: Engine, ask, whole: Result, tmp_path: Path):
    result = finish(engine, ask(pose=whole.paths[0], save=tmp_path / "posed.mp4"))
    texts = [note.text for note in result.plan.notes if note.about == "pose"]
    assert any("no pose to follow" in text for text in texts)
    assert not torch.equal(pixels(result.paths[0]), pixels(whole.paths[0]))


@pytest.mark.parametrize("kind", ["webm", "gif"])
def test_other_containers(engine: Engine, ask, tmp_path: Path, kind: str):
    result = finish(engine, ask(output=kind, save=tmp_path / f"o.{kind}"))
    mute = [note for note in result.plan.notes if "holds no sound" in note.text]
    assert len(mute) == (kind == "gif")
    with av.open(str(result.paths[0])) as container:
        assert bool(container.streams.audio) == (kind == "webm")


def test_two_seeds_make_two_videos(engine: Engine, ask, tmp_path: Path):
    results = [e for e in engine.run(engine.plan(ask(count=2, clips=1))) if isinstance(e, Result)]
    assert len(results) == 2
    assert not torch.equal(pixels(results[0].paths[0]), pixels(results[1].paths[0]))


# --- nothing is lost ---------------------------------------------------------------------------------


def stop_after(engine: Engine, plan: Plan, steps: int) -> Cancelled:
    """Run a plan and cancel it when so many steps are done."""
    done = 0

    def enough() -> bool:
        return done >= steps

    with pytest.raises(Cancelled) as caught:
        for event in engine.run(plan, cancelled=enough):
            if isinstance(event, Progress) and event.stage == "sample":
                done = event.done
    return caught.value


def test_a_cancelled_run_goes_on_from_its_finished_clips(engine: Engine, ask, whole: Result, tmp_path: Path):
    error = stop_after(engine, engine.plan(ask()), steps=3)
    folder = tmp_path / "out.clips"
    assert f"kinema resume {folder}" in error.hint and "1 of 3 clips" in error.hint
    assert sorted(path.name for path in folder.iterdir()) == ["clip_0001.safetensors"]
    assert not (tmp_path / "out.mp4").exists()
    events = list(engine.resume(folder))
    assert {e.total for e in events if isinstance(e, Progress) and e.stage == "sample"} == {4}
    (result,) = (event for event in events if isinstance(event, Result))
    assert result.paths[0] == tmp_path / "out.mp4" and not folder.exists()
    assert torch.equal(pixels(result.paths[0]), pixels(whole.paths[0]))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_clip_goes_on_behind_its_last_saved_step(
    engine: Engine, ask, whole: Result, tmp_path: Path, steps: int
):
    """In the first clip and in the second one: to the same bits."""
    error = stop_after(engine, engine.plan(ask(save_steps=0, output="mp4,latents")), steps)
    folder = tmp_path / "out.clips"
    assert f"kinema resume {folder}" in error.hint and ("kinema decode" in error.hint) == (steps > 2)
    assert (folder / f"clip_{steps // 2 + 1:04}.steps.safetensors").exists()
    if steps == 1:
        with pytest.raises(CheckpointError, match="no clips"):
            list(engine.decode(folder))
    events = list(engine.resume(folder, Request(save=tmp_path / "on.mp4", output="mp4,latents")))
    assert {e.total for e in events if isinstance(e, Progress) and e.stage == "sample"} == {6 - steps}
    (result,) = (event for event in events if isinstance(event, Result))
    assert torch.equal(ops.read_latents(result.paths[1])[0], ops.read_latents(whole.paths[1])[0])
    assert not folder.exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_clips_of_changed_files_are_not_gone_on_with(engine: Engine, ask, tmp_path: Path, steps: int):
    plan = engine.plan(ask(save_steps=0))
    stop_after(engine, plan, steps)
    plan.images[0].path.touch()
    with pytest.raises(CheckpointError, match="has changed since"):
        list(engine.resume(tmp_path / "out.clips"))


def test_finished_clips_alone_make_a_video(engine: Engine, ask, whole: Result, tmp_path: Path):
    stop_after(engine, engine.plan(ask()), steps=5)
    folder = tmp_path / "out.clips"
    (result,) = (e for e in engine.decode(folder, Request(save=tmp_path / "part.mp4")) if isinstance(e, Result))
    assert folder.exists() and result.plan.frames == 13
    difference = (pixels(result.paths[0]) - pixels(whole.paths[0])[:13]).abs().mean()
    assert difference < 2, "the same frames, encoded as a shorter video"
    assert abs(len(read_audio(result.paths[0])) / 16_000 - 13 / 16) < 0.03


def test_a_disk_that_fails_at_the_end_loses_no_clip(engine: Engine, ask, tmp_path: Path):
    plan = engine.plan(ask())
    (tmp_path / "out.mp4").mkdir()
    with pytest.raises(OutputError) as caught:
        list(engine.run(plan))
    assert "kinema resume" in caught.value.hint
    assert len(list((tmp_path / "out.clips").iterdir())) >= 1


def test_a_run_that_ends_before_a_clip_is_done_leaves_nothing(engine: Engine, ask, tmp_path: Path):
    error = stop_after(engine, engine.plan(ask()), steps=1)
    assert "resume" not in error.hint and not (tmp_path / "out.clips").exists()


def test_a_gap_among_finished_clips_is_refused(engine: Engine, ask, tmp_path: Path):
    stop_after(engine, engine.plan(ask()), steps=5)
    (tmp_path / "out.clips/clip_0001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="without a gap"):
        list(engine.resume(tmp_path / "out.clips"))


@pytest.mark.parametrize("name", ["nowhere", "voice.wav", "empty"])
def test_what_holds_no_clips_is_refused(engine: Engine, ask, tmp_path: Path, name: str):
    ask()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name):
        list(engine.resume(tmp_path / name))


def test_memory_that_runs_out_between_clips_says_how_to_go_on(engine: Engine, ask, tmp_path: Path):
    """Out of memory is told by its own error; the clips that are done, and how to go on, belong into it."""
    plan = engine.plan(ask())
    with pytest.raises(MachineError) as caught:
        for event in engine.run(plan, cancelled=lambda: exhausted(tmp_path)):
            del event
    assert f"kinema resume {tmp_path / 'out.clips'}" in caught.value.hint


def exhausted(folder: Path) -> bool:
    """Memory runs out as soon as one clip is done."""
    if (folder / "out.clips").is_dir():
        raise torch.OutOfMemoryError("CUDA out of memory")
    return False


# --- refused before a weight is loaded ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"audio": None}, "needs speech or music"),
        ({"reference": ()}, "needs a reference image"),
        ({"clips": 4}, "clips 4: 3 of 0.5 s cover the sound"),
        ({"size": "96x64"}, "multiples of 64"),
        ({"frames": 9}, "frames 9: the sound says"),
        ({"fps": 24}, "fps 24: the sound says"),
        ({"first": "face.png"}, "takes no first"),
        ({"speech_text": "hello"}, "both say what is heard"),
        ({"speech_text": "hello", "audio": None}, "needs a service"),
    ],
)
def test_requests_that_cannot_be_met(engine: Engine, ask, tmp_path: Path, fields: dict[str, object], match: str):
    with pytest.raises(RequestError, match=match):
        engine.plan(ask(**fields))


def test_too_short_a_sound_is_refused(engine: Engine, ask, tmp_path: Path):
    with pytest.raises(RequestError, match=r"at least 0\.25 s"):
        engine.plan(ask(audio=voice(tmp_path, 0.15)))


def test_two_references_are_refused(engine: Engine, ask, tmp_path: Path):
    with pytest.raises(RequestError, match="one reference image, got 2"):
        engine.plan(ask(reference=[tmp_path / "face.png"] * 2))


def test_speech_fields_mean_nothing_to_other_models(engine: Engine, tmp_path: Path):
    with pytest.raises(RequestError, match="not driven by sound: --clips"):
        engine.plan(Request(model="tiny-t2v", prompt="a cat", clips=2, device="cpu"))


def test_what_was_decided_is_noted(engine: Engine, ask, tmp_path: Path):
    notes: tuple[Note, ...] = engine.plan(ask(audio=voice(tmp_path, 1.03))).notes
    texts = " | ".join(note.text for note in notes)
    assert "3 clips of 0.5 s" in texts and "left out, and 0.19 s of sound" in texts
    assert "--clips 2 leaves it out" in texts
    assert "64x64: 64x64 as area, at the aspect of face.png (96x80)" in texts


def test_another_speech_encoder_is_refused(engine: Engine, ask, settings: Settings, tmp_path: Path):
    from checkpoints import TINY, official_state, write

    write(tmp_path / "other.safetensors", official_state("audio_encoder", {**TINY["audio_encoder"], "num_layers": 3}))
    with pytest.raises(CheckpointError, match="4 hidden states"):
        engine.plan(ask(audio_encoder=tmp_path / "other.safetensors"))


def test_files_alone_say_what_they_are(engine: Engine, ask, settings: Settings, tiny_world: TinyWorld):
    files = {
        "dit": settings.models[0] / "diffusion_models/s2v.safetensors",
        "audio_encoder": settings.models[0] / "audio_encoders/tiny_wav2vec2.safetensors",
        "vae": tiny_world.file("vae/tiny_vae.safetensors"),
        "text_encoder": tiny_world.file("text_encoders/tiny_umt5.safetensors"),
    }
    assert engine.plan(ask(model=None, **files)).model == "tiny-s2v"


def test_a_plan_is_the_same_when_its_folder_is_gone(engine: Engine, ask, tmp_path: Path):
    plan = engine.plan(ask())
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    shutil.rmtree(tmp_path)
