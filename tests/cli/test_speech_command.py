"""Speech to video from the command line: a request to an mp4 with sound, and on from finished clips."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from conftest import Cli
from kinema.schema import Settings
from speech_world import inputs


@pytest.fixture
def speaking(cli: Cli, speech_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("KINEMA_MODELS", ":".join(map(str, speech_settings.models)))
    monkeypatch.setenv("KINEMA_CATALOGS", ":".join(map(str, speech_settings.catalogs)))
    return cli


def words(tmp_path: Path) -> list[str | Path]:
    given = inputs(tmp_path)
    media = ("--reference", given["reference"], "--audio", given["audio"])
    return ["a cat walks", "--model", "tiny-s2v", *media, "--seed", "3", "--device", "cpu", "--steps", "1"]


def test_a_request_makes_a_video_that_speaks(speaking: Cli, tmp_path: Path):
    ran = speaking("generate", *words(tmp_path), "--save", tmp_path / "o.mp4")
    assert ran.code == 0, ran.err
    assert "3 clips of 0.5 s" in ran.err
    with av.open(str(ran.paths[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21 and container.streams.audio


def test_the_plan_tells_of_clips_and_sound(speaking: Cli, tmp_path: Path):
    ran = speaking("plan", *words(tmp_path))
    assert ran.code == 0, ran.err
    for text in ("3 of 8 frames", "1.31 s from 0.1875 s", "audio encoder", "speech to video"):
        assert text in ran.out, text


def test_resume_says_what_is_wrong_with_a_folder(speaking: Cli, tmp_path: Path):
    ran = speaking("resume", tmp_path / "nowhere.clips")
    assert ran.code in (2, 4) and "nowhere.clips" in ran.err
