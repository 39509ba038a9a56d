"""Animate from request to file: both modes, clip after clip, from Python and the command line."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import kinema
from animate_world import driving_video, masks, moving, replacement
from checkpoints import official_state
from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.media.audio import audio_facts
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.media.video import write as write_video
from kinema.planning.clips import back_and_forth, overlapping_clips
from kinema.schema import Note, Plan, Request, Result, Settings
from kinema.tensors import Media
from lora_files import low_rank, write_lora
from tiny_world import DITS, picture

FRAMES = 20  # clips of 9 that overlap by 1: 0-8, 8-16, and 16-24 of which 17-19 are new


@pytest.fixture(scope="module")
def settings(animate_settings: Settings) -> Settings:
    return animate_settings


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {**replacement(folder, FRAMES), "video": driving_video(folder, FRAMES)}


@pytest.fixture
def ask(tmp_path: Path, inputs: dict[str, Path]):
    def request(*roles: str, **fields: object) -> Request:
        given = {"model": "tiny-animate", "seed": 3, "save": tmp_path / "out.mp4", "device": "cpu"}
        media = {role: inputs[role] for role in ("reference", "pose", "face", *roles)}
        return Request(**{**given, "precision": "reference", **media, **fields})

    return request


def finish(engine: Engine, request: Request) -> Result:
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return result


def pixels(path: Path) -> torch.Tensor:
    return torch.stack(list(read_video(path))).float()


def texts(plan: Plan, about: str) -> list[str]:
    return [note.text for note in plan.notes if note.about == about]


# --- runs ------------------------------------------------------------------------------------------


def test_animation_in_three_clips(engine: Engine, ask):
    result = finish(engine, ask())
    plan = result.plan
    assert (plan.task, plan.width, plan.height, plan.frames, plan.fps) == ("animation", 64, 48, FRAMES, 30)
    assert [(clip.start, clip.skip, clip.shown) for clip in plan.clips] == [(0, 0, 9), (8, 1, 8), (16, 1, 3)]
    assert plan.latent == (16, 4, 6, 8) and plan.tokens == 4 * 3 * 4
    facts = probe(result.paths[0])
    assert (facts.width, facts.height, facts.frames, facts.fps) == (64, 48, FRAMES, 30)
    assert plan.prompt == "a cat walks" and plan.sound is None


def test_replacement_keeps_the_scene_and_its_sound(engine: Engine, ask, tmp_path: Path):
    result = finish(engine, ask("mask", "background"))
    assert result.plan.task == "replacement" and probe(result.paths[0]).frames == FRAMES
    heard = finish(engine, ask("mask", "video", keep_audio=True, save=tmp_path / "heard.mp4"))
    assert [video.role for video in heard.plan.videos] == ["pose", "face", "mask", "video"]
    assert audio_facts(heard.paths[0]).seconds == pytest.approx(FRAMES / 30, abs=0.05)
    assert not torch.equal(pixels(result.paths[0]), pixels(heard.paths[0])), (
        "black in place of the person is another scene"
    )


def test_every_input_has_its_say(engine: Engine, ask, tmp_path: Path):
    """Another skeleton, face, scene, mask or reference makes another video; the same ones the same."""
    first = pixels(finish(engine, ask("mask", "background", frames=5)).paths[0])
    again = pixels(finish(engine, ask("mask", "background", frames=5, save=tmp_path / "again.mp4")).paths[0])
    assert torch.equal(first, again)
    others = {
        "pose": moving(tmp_path / "a.mp4", FRAMES, seed=7),
        "face": moving(tmp_path / "b.mp4", FRAMES, (32, 32), seed=8),
        "background": moving(tmp_path / "c.mp4", FRAMES, seed=9),
        "mask": masks(tmp_path / "d.mp4", FRAMES, empty=True),
        "reference": picture(tmp_path / "e.png", 50, 90, seed=5),
    }
    for role, path in others.items():
        save = tmp_path / f"{role}.mp4"
        other = pixels(finish(engine, ask("mask", "background", **{"frames": 5, "save": save, role: path})).paths[0])
        assert not torch.equal(first, other), role


def test_frames_without_anybody_are_told(engine: Engine, ask, tmp_path: Path):
    """Of two clips of 9 and 3 frames, each clip by itself; the run goes on."""
    video = torch.zeros(FRAMES, 48, 64, 3, dtype=torch.uint8)
    video[:4, :, 32:] = 255
    write_video(Media(iter([video]), FRAMES, 64, 48, 30, {}), tmp_path / "m.mp4", "mp4", 100)
    plan = engine.plan(ask("mask", "background", mask=tmp_path / "m.mp4", frames=12))
    told = [event.text for event in engine.run(plan) if isinstance(event, Note) and "empty in" in event.text]
    assert told == [
        "empty in 5 of the 9 frames of clip 1: nobody is replaced there",
        "empty in 3 of the 3 frames of clip 2: nobody is replaced there",
    ]


def test_python_warns_of_what_no_plan_knew(settings: Settings, ask, tmp_path: Path):
    asked = ask("mask", "background", mask=masks(tmp_path / "m.mp4", FRAMES, empty=True), frames=5)
    with pytest.warns(UserWarning, match="empty in 5 of the 5 frames") as warned:
        result = kinema.generate(settings=settings, **asked.model_dump(exclude_unset=True))
    assert not {str(one.message) for one in warned} & {note.text for note in result.plan.notes}
    assert {Path(one.filename) for one in warned} == {Path(__file__)}, "where it was asked for"


@pytest.mark.parametrize("role", ["mask", "background"])
def test_one_image_is_that_of_every_frame(engine: Engine, ask, inputs: dict[str, Path], tmp_path: Path, role: str):
    """The same bits as a video that shows the image all along; an image moved by a pixel makes another video."""
    shown = next(read_video(inputs[role]))
    paths = {"still": tmp_path / "still.png", "moved": tmp_path / "moved.png"}
    Image.fromarray(shown.numpy()).save(paths["still"])
    Image.fromarray(shown.roll(8, 1).numpy()).save(paths["moved"])
    paths["folder"] = tmp_path / "folder"
    paths["folder"].mkdir()
    for number in range(12):
        Image.fromarray(shown.numpy()).save(paths["folder"] / f"{number}.png")
    made = {}
    for name, path in paths.items():
        result = finish(
            engine, ask("mask", "background", **{role: path, "frames": 12, "save": tmp_path / f"{name}.mp4"})
        )
        assert len(result.plan.clips) == 2, "also where a second clip reads on"
        told = [f"{name}.png is one image: the {role} of all 12 frames"] if name != "folder" else []
        assert texts(result.plan, role) == told
        made[name] = pixels(result.paths[0])
    assert torch.equal(made["still"], made["folder"]) and not torch.equal(made["still"], made["moved"])


def test_guidance_sees_no_face(engine: Engine, ask, tmp_path: Path):
    alone = pixels(finish(engine, ask(frames=5)).paths[0])
    guided = pixels(finish(engine, ask(frames=5, guidance=3, save=tmp_path / "guided.mp4")).paths[0])
    assert not torch.equal(alone, guided)


@pytest.mark.parametrize("guidance", [1, 3])
def test_streamed_blocks_give_the_bits_of_resident_ones(engine: Engine, ask, tmp_path: Path, guidance: float):
    """Face blocks travel with the blocks they follow, in prepare and at every step, one branch or two."""
    roles = ["mask", "background"] if guidance == 1 else []

    def latents(swapped: int) -> torch.Tensor:
        save = tmp_path / f"{swapped}.latents.safetensors"
        request = ask(*roles, frames=12, guidance=guidance, blocks_to_swap=swapped, precision="fast", save=save)
        result = finish(engine, request)
        assert result.plan.experts["model"].resident_blocks == (2 - swapped if swapped else None)
        return load_file(save)["latents"]

    resident = latents(0)
    assert torch.equal(latents(1), resident) and torch.equal(latents(2), resident)


def test_a_relighting_lora_without_a_scene_is_told(engine: Engine, ask, tmp_path: Path):
    """It is known by its name; the file is any LoRA that fits."""
    shapes = {name: tuple(tensor.shape) for name, tensor in official_state("dit", DITS["clip"]).items()}
    lora = write_lora(tmp_path / "WanAnimate_relight_lora_fp16.safetensors", "peft", low_rank(shapes))
    told = texts(engine.plan(ask(lora=[lora])), "lora")
    assert any("fits a person to a scene in replacement; this is animation" in text for text in told)
    told = texts(engine.plan(ask("mask", "background", lora=[lora])), "lora")
    assert not any("this is animation" in text for text in told)


def test_a_single_frame_and_a_still_skeleton(engine: Engine, ask, tmp_path: Path):
    one = {
        "pose": moving(tmp_path / "one.mp4", 1, seed=1),
        "face": moving(tmp_path / "oneface.mp4", 1, (32, 32), seed=2),
    }
    result = finish(engine, ask(**one))
    assert result.plan.frames == 1 and len(result.plan.clips) == 1 and probe(result.paths[0]).frames == 1
    assert any("8 frames beyond" in text for text in texts(result.plan, "frames"))


def test_five_frames_of_overlap(engine: Engine, ask):
    result = finish(engine, ask(overlap=5))
    assert [clip.start for clip in result.plan.clips] == [0, 4, 8, 12]
    assert probe(result.paths[0]).frames == FRAMES


def test_noise_is_drawn_on_from_clip_to_clip(engine: Engine):
    from kinema.sampling.denoiser import noise

    generator = torch.Generator("cpu").manual_seed(11)
    drawn = [torch.randn(1, 16, 4, 6, 8, generator=generator) for _ in range(3)]
    assert all(torch.equal(noise(11, (1, 16, 4, 6, 8), draw=n), one) for n, one in enumerate(drawn))


def test_the_command_line(
    settings: Settings, inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from kinema.cli import main

    words = ["generate", "--model", "tiny-animate", "--frames", "12", "--seed", "1"]
    words += ["--save", str(tmp_path / "cli.mp4")]
    for role in ("reference", "pose", "face", "mask", "background"):
        words += [f"--{role}", str(inputs[role])]
    for root in settings.models:
        words += ["--models-dir", str(root)]
    for catalog in settings.catalogs:
        words += ["--catalog", str(catalog)]
    assert main([*words, "--video", str(inputs["video"])]) == 2
    assert "has no use" in capsys.readouterr().err
    assert main([*words, "--video", str(inputs["video"]), "--keep-audio"]) == 0, capsys.readouterr().err
    assert probe(tmp_path / "cli.mp4").frames == 12
    assert audio_facts(tmp_path / "cli.mp4").seconds == pytest.approx(0.4, abs=0.05)


# --- plans -----------------------------------------------------------------------------------------


def test_what_is_decided_is_told(engine: Engine, ask, tmp_path: Path):
    slow = moving(tmp_path / "slow.mp4", 10, (70, 50), seed=1, fps=15)
    plan = engine.plan(ask(pose=slow))
    assert (plan.width, plan.height, plan.frames) == (64, 48, 20)
    assert "slow.mp4 (15 fps) is read at 30 fps" in texts(plan, "pose")
    assert any("near that of slow.mp4 (70x50), in multiples of 16" in text for text in texts(plan, "size"))
    assert any("20 frames in 3 clips of 9" in text for text in texts(plan, "frames"))
    assert any("is shown whole on black" in text for text in texts(plan, "reference"))
    assert any("made with one prompt alone" in text for text in texts(plan, "prompt"))
    assert engine.plan(ask(seconds=0.5)).frames == 15
    cut = engine.plan(ask("video", keep_audio=True, frames=12))
    assert texts(cut, "keep_audio") == ["the sound of dance.mp4 (0.67 s) is cut with the video, 0.40 s"]
    assert not texts(engine.plan(ask("video", keep_audio=True)), "keep_audio")
    assert engine.plan(ask(size="32x32")).latent[2:] == (4, 4)


def test_transparency_of_a_driving_video_is_told(engine: Engine, ask, tmp_path: Path):
    frames = np.zeros((48, 64, 4), np.uint8)
    frames[:, 32:] = 255
    with av.open(str(tmp_path / "m.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        for _ in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames, format="rgba")))
        container.mux(stream.encode())
    plan = engine.plan(ask("mask", "background", mask=tmp_path / "m.webm"))
    assert texts(plan, "mask") == ["m.webm has transparency, which is shown as black"]


BAD = {
    "mask alone": (["mask"], {}, "not in what"),
    "background alone": (["background"], {}, "needs a mask"),
    "video without use": (["video"], {}, "has no use"),
    "overlap": ([], {"overlap": 3}, "last 1 or 5 frames"),
    "frames": ([], {"frames": 21}, "shows 20 at 30 fps"),
    "size": ([], {"size": "60x48"}, "multiples of 16"),
    "outpaint": (["video"], {"outpaint": True, "keep_audio": True}, "makes nothing around it"),
    "both lengths": ([], {"frames": 3, "seconds": 1}, "both say how long"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_mean_anything_is_refused(engine: Engine, ask, case: str):
    roles, fields, message = BAD[case]
    with pytest.raises(RequestError, match=message):
        engine.plan(ask(*roles, **fields))


def test_inputs_that_do_not_fit_each_other_are_refused(engine: Engine, ask, tmp_path: Path, inputs: dict[str, Path]):
    with pytest.raises(RequestError, match="of another shape than"):
        engine.plan(ask("background", mask=masks(tmp_path / "m.mp4", FRAMES, (48, 64))))
    with pytest.raises(RequestError, match=r"face .* shows 5 frames at 30 fps; 20 are made"):
        engine.plan(ask(face=moving(tmp_path / "f.mp4", 5, (32, 32), seed=1)))
    with pytest.raises(RequestError, match=r"face .* shows 1 frames at 30 fps; 20 are made") as caught:
        engine.plan(ask(face=picture(tmp_path / "f.png", 32, 32)))
    assert "one image" not in caught.value.hint, "a face that moves, of a skeleton that does"
    with pytest.raises(RequestError, match=r"mask .* shows 5 frames") as caught:
        engine.plan(ask("background", mask=masks(tmp_path / "short.mp4", 5)))
    assert "one image for all frames" in caught.value.hint
    with pytest.raises(RequestError, match="2 reference images"):
        engine.plan(ask(reference=(inputs["reference"], inputs["reference"])))
    with pytest.raises(RequestError, match="has no sound") as caught:
        engine.plan(ask(keep_audio=True))
    assert "pass --video with the clip that pose.mp4 was made of" in caught.value.hint
    with pytest.raises(RequestError, match=r"--video gone\.mp4: no such file"):
        engine.plan(ask("mask", video=Path("gone.mp4"), keep_audio=True))
    with pytest.raises(RequestError, match="not made of a driving video: --overlap 1 means nothing to it"):
        engine.plan(Request(model="tiny-t2v", prompt="a cat", overlap=1, device="cpu"))
    with pytest.raises(RequestError, match="tiny-animate needs a skeleton video"):
        engine.plan(Request(model="tiny-animate", reference=inputs["reference"], face=inputs["face"], device="cpu"))


# --- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "length", "overlap"), [(15, 9, 1), (1, 9, 1), (9, 9, 1), (10, 9, 5), (77, 77, 1), (400, 77, 5)]
)
def test_clips_make_every_frame_once(frames: int, length: int, overlap: int):
    clips = overlapping_clips(frames, length, overlap)
    assert sum(clip.shown for clip in clips) == frames and all(clip.shown > 0 for clip in clips)
    assert [clip.start + clip.skip for clip in clips[1:]] == [clip.start + clip.frames for clip in clips[:-1]]


def test_time_runs_back_and_forth():
    assert back_and_forth(4, 0, 12) == (0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1)
    assert back_and_forth(15, 8, 9) == (8, 9, 10, 11, 12, 13, 14, 13, 12)
    assert back_and_forth(1, 0, 3) == (0, 0, 0) and back_and_forth(2, 0, 4) == (0, 1, 0, 1)
