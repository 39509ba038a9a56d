"""The verbs end to end, on small models in real files: argv in, files, streams and exit codes out."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import Cli
from kinema.schema import Plan
from kinema.version import VERSION
from tiny_world import TinyWorld, picture

SMALL = ("--model", "tiny-t2v", "--device", "cpu")


def test_version_and_help(cli: Cli):
    assert cli("--version").out.strip() == f"kinema {VERSION}"
    shown = cli("--help")
    assert shown.code == 0 and "generate" in shown.out
    assert "--guidance-high" in cli("generate", "--help").out


def test_generate_writes_a_video_and_prints_only_its_path(tiny: Cli):
    ran = tiny("generate", "a cat walks on grass", *SMALL, "--seed", "5")
    assert ran.code == 0, ran.err
    (path,) = ran.paths
    assert path == Path("outputs/a-cat-walks-on-grass-5.mp4") and path.stat().st_size > 0
    assert "together" in ran.err and "peak" in ran.err


def test_generate_in_json(tiny: Cli):
    ran = tiny("generate", "a cat", *SMALL, "--seeds", "1,2", "--json")
    assert ran.code == 0, ran.err
    kinds = [event["event"] for event in ran.events]
    assert kinds.count("result") == 2 and "progress" in kinds
    results = [event for event in ran.events if event["event"] == "result"]
    assert [event["seed"] for event in results] == [1, 2]
    assert all(Path(path).is_file() for event in results for path in event["paths"])
    assert Plan.model_validate(results[0]["plan"]).seeds == (1,)


def test_aliases_of_flags(tiny: Cli, tmp_path: Path):
    image = picture(tmp_path / "first.png", 32, 32)
    out = tmp_path / "deep" / "clip.gif"
    ran = tiny("generate", "a cat", "--model", "tiny-ti2v", "--image", image, "-o", out, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert ran.paths == [out] and out.read_bytes().startswith(b"GIF8")


def test_errors_have_their_code_and_three_parts(tiny: Cli):
    ran = tiny("generate", "a cat", *SMALL, "--frames", "6")
    assert (ran.code, ran.out) == (2, "")
    assert "frames 6" in ran.err and "5" in ran.err and "--frames 5" in ran.err
    ran = tiny("generate", "a cat", *SMALL, "--frames", "6", "--json")
    assert ran.code == 2 and ran.err == ""
    assert ran.error["error"] == "RequestError" and ran.error["details"]["nearest"] == 5


def test_plan_is_readable_and_json(tiny: Cli):
    ran = tiny("plan", "a [red] cat", *SMALL, "--steps", "3", "--seed", "4")
    assert ran.code == 0, ran.err
    for words in ("tiny-t2v", "a [red] cat", "32x32", "latent grid", "timestep", "t2v.safetensors", "seeds"):
        assert words in ran.out
    ran = tiny("plan", "a cat", *SMALL, "--json")
    assert Plan.model_validate_json(ran.out).model == "tiny-t2v"
    assert not Path("outputs").exists()


def test_brackets_in_a_plan_are_no_markup(tiny: Cli):
    text = "a [red] cat [1] on [/mat] of C:\\[q]"
    assert text in tiny("plan", text, *SMALL).out


def test_inspect_goes_on_after_an_unreadable_file(tiny: Cli, tiny_world: TinyWorld, tmp_path: Path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    vae = tiny_world.file("vae/tiny_vae.safetensors")
    ran = tiny("inspect", broken, vae, tiny_world.file("diffusion_models/t2v_high.safetensors"))
    assert ran.code == 4
    assert str(broken) in ran.err and "error" in ran.err
    assert "component" in ran.out and "vae" in ran.out and "high-noise expert, by its name only" in ran.out
    ran = tiny("inspect", vae, "--json")
    assert ran.code == 0 and ran.events[0]["component"] == "vae" and ran.events[0]["kind"] == "weights"


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "webp", "png", "latents"])
def test_inspect_reads_the_plan_of_every_output(tiny: Cli, kind: str):
    (path,) = tiny("generate", "a cat", *SMALL, "--output", kind, "--seed", "3").paths
    ran = tiny("inspect", path, "--json")
    assert ran.code == 0, ran.err + ran.out
    assert Plan.model_validate(ran.events[0]["plan"]).seeds == (3,)
    assert "a cat" in tiny("inspect", path).out


def test_replay_makes_the_same_beside(tiny: Cli):
    (path,) = tiny("generate", "a cat", *SMALL, "--output", "latents", "--seed", "3").paths
    ran = tiny("replay", path)
    assert ran.code == 0, ran.err
    (again,) = ran.paths
    assert again.name == "a-cat-3-replay.latents.safetensors"
    assert latents(again) == latents(path)
    assert tiny("replay", path).paths[0].name == "a-cat-3-replay-2.latents.safetensors"


def latents(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_replay_refuses_changed_weights(tiny: Cli, tiny_world: TinyWorld, tmp_path: Path):
    vae = tmp_path / "vae.safetensors"
    vae.write_bytes(tiny_world.file("vae/tiny_vae.safetensors").read_bytes())
    (path,) = tiny("generate", "a cat", *SMALL, "--vae", vae).paths
    data = bytearray(vae.read_bytes())
    data[-1] ^= 1
    vae.write_bytes(data)
    ran = tiny("replay", path)
    assert ran.code == 4 and str(vae) in ran.err and "--allow-changed" in ran.err
    ran = tiny("replay", path, "--allow-changed", "--json")
    assert ran.code == 0
    assert any(event["event"] == "note" and str(vae) in event["text"] for event in ran.events)
    vae.unlink()
    assert tiny("replay", path, "--allow-changed").code == 4


def test_replay_of_what_has_no_plan(tiny: Cli):
    (path,) = tiny("generate", "a cat", *SMALL, "--strip").paths
    ran = tiny("replay", path)
    assert ran.code == 4 and "carries no plan" in ran.err
    assert tiny("replay", "nothing.mp4").code == 4


def test_decode_makes_the_video_of_latents(tiny: Cli):
    (path,) = tiny("generate", "a cat", *SMALL, "--output", "latents", "--seed", "3").paths
    ran = tiny("decode", path, "-o", "late.mp4")
    assert ran.code == 0, ran.err
    assert ran.paths == [Path("late.mp4")] and Path("late.mp4").stat().st_size > 0


def test_models_lists_what_is_installed(tiny: Cli):
    rows = {row["name"]: row for row in json.loads(tiny("models", "--json").out)}
    assert rows["tiny-t2v"]["installed"] and not rows["wan2.2-t2v-a14b"]["installed"]
    assert "tiny-t2v" in tiny("models").out


def test_doctor_never_fails(tiny: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINEMA_GUIDENCE", "3")
    ran = tiny("doctor")
    assert ran.code == 0
    for words in ("torch", "sdpa", "libx264", "free", "empty.toml", "flash_attn", "KINEMA_GUIDANCE"):
        assert words in ran.out, words
    found = json.loads(tiny("doctor", "--json").out.splitlines()[-1])
    assert found["attention"]["sdpa"].startswith("works")
    assert "512 MB" in found["encoded texts"] and "texts: may be deleted" in found["encoded texts"]


def test_interactive_lives_through_errors(tiny: Cli, monkeypatch: pytest.MonkeyPatch):
    lines = "# a comment\na cat --d 7\na cat --frames 6\na dog --stepz 3\n\na dog --d 8\nexit\na bird --d 9\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    ran = tiny("generate", *SMALL, "--interactive")
    assert ran.code == 0
    assert [path.name for path in ran.paths] == ["a-cat-7.mp4", "a-dog-8.mp4"]
    assert "frames 6" in ran.err and "--steps" in ran.err


# --- other processes ---------------------------------------------------------------------------------


def start(*argv: str, cwd: Path, prelude: str = "") -> subprocess.Popen[str]:
    code = f"{prelude}\nimport sys\nfrom kinema.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_a_step_and_leaves_no_file(tiny: Cli, tmp_path: Path, number: signal.Signals):
    long = ("--steps", "1000", "--frames", "41", "--size", "64x64", "--json")
    process = start("generate", "a cat", *SMALL, *long, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and event["stage"] == "sample" and event["done"] >= 2:
            break
    process.send_signal(number)
    asked = time.monotonic()
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 130
    assert time.monotonic() - asked < 120
    assert json.loads(out.splitlines()[-1])["error"] == "Cancelled"
    assert list(tmp_path.rglob("outputs/*")) == []


NO_NETWORK = """
import os, sys
def watch(event, args):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        os.write(2, b"a socket was made")
        os._exit(77)
sys.addaudithook(watch)
"""


def test_nothing_touches_the_network(tiny: Cli, tmp_path: Path):
    process = start("generate", "a cat", *SMALL, cwd=tmp_path, prelude=NO_NETWORK)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert (tmp_path / out.strip()).is_file()


def test_the_network_trap_catches(tmp_path: Path):
    process = start("--version", cwd=tmp_path, prelude=NO_NETWORK + "\nimport socket; socket.socket()")
    _, err = process.communicate(timeout=280)
    assert process.returncode == 77 and "a socket was made" in err


def test_the_demo_makes_a_video_with_the_shipped_model(cli: Cli):
    ran = cli("demo", "--steps", "2", "--device", "cpu")
    assert ran.code == 0, ran.err
    (path,) = ran.paths
    assert path.suffix == ".mp4" and path.stat().st_size > 0
    assert "sample" in ran.err and "peak" in ran.err
