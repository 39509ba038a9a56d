"""Batches: every source, every fault told, and a run that goes on where it stopped. Small models, real files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lines import REQUESTS, render_line

from conftest import Cli
from kinema.batch.manifest import NOT_CONTENT, Manifest, content_keys
from kinema.batch.run import manifest_path, plan_lines, run_lines
from kinema.batch.sources import read_lines
from kinema.engine import Engine
from kinema.errors import KinemaError, RequestError
from kinema.schema import Request, Result
from tiny_world import TinyWorld, picture

BASE = {"model": "tiny-t2v", "device": "cpu", "steps": 1}
FLAGS = ("--model", "tiny-t2v", "--device", "cpu", "--steps", "1")


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


# --- sources -----------------------------------------------------------------------------------------


def test_a_text_file(tmp_path: Path):
    path = write(
        tmp_path / "p.txt", "\ufeff# comment\n\nA cat --s 3\r\n  # another\nA dog --d 7\n--s 4\nA bird --stepz 4\n"
    )
    lines = read_lines(path, {"steps": 9, "prompt": "A fox"})
    assert [line.number for line in lines] == [3, 5, 6, 7]
    assert [line.request and (line.request.prompt, line.request.steps) for line in lines[:3]] == [
        ("A cat", 3),
        ("A dog", 9),
        ("A fox", 4),
    ]
    assert isinstance(lines[3].fault, RequestError) and "--steps" in lines[3].fault.message


def test_json_lines(tmp_path: Path):
    rows = [
        '{"prompt": "a cat\\nin two lines", "guidance-high": 4, "seed": null}',
        '{"prompt": 3}',
        "{",
        "[1]",
        '{"stepz": 3}',
    ]
    lines = read_lines(write(tmp_path / "p.jsonl", "\n".join(rows) + "\n"), {})
    assert lines[0].request == Request(prompt="a cat\nin two lines", guidance_high=4)
    assert [line.number for line in lines] == [1, 2, 3, 4, 5]
    for line, words in zip(lines[1:], ("prompt 3 is not text", "not JSON", "no JSON object", "'steps'"), strict=True):
        assert line.fault and words in line.fault.message


def test_csv(tmp_path: Path):
    text = 'prompt,seed,reference,steps\n"a cat, walking",3,a.png; b.png,\n\na dog,x,,\n"two\nlines",4,,2\na,b\n'
    lines = read_lines(write(tmp_path / "p.csv", text), {"steps": 9})
    assert lines[0].request == Request(
        prompt="a cat, walking", seed=3, reference=(Path("a.png"), Path("b.png")), steps=9
    )
    assert lines[1].fault and "seed 'x'" in lines[1].fault.message and lines[1].number == 4
    assert lines[2].request == Request(prompt="two\nlines", seed=4, steps=2)
    assert lines[3].fault and "2 cells under 4 columns" in lines[3].fault.message and lines[3].number == 7


def test_a_folder_of_images(tmp_path: Path):
    for name in ("b.png", "a.jpg", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    write(tmp_path / "a.txt", "A cat\nwalks. --s 3\n")
    write(tmp_path / "c.txt", "A dog --stepz 3")
    write(tmp_path / "readme.md", "no image")
    first, second, third = read_lines(tmp_path, {"prompt": "It moves.", "steps": 9})
    assert first.request == Request(prompt="A cat walks.", first=tmp_path / "a.jpg", steps=3)
    assert second.request == Request(prompt="It moves.", first=tmp_path / "b.png", steps=9)
    assert third.where == "c.webp" and third.fault


@given(st.lists(REQUESTS, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_of_rendered_requests_reads_back_and_planted_faults_are_found(requests: list[Request], data: Any):
    import tempfile

    text = [render_line(request) for request in requests]
    broken = data.draw(
        st.sampled_from(["cat --nothing 3", "cat --s", 'cat --n "open --s 3', "cat --w 3", "cat --s 1 --s 2"])
    )
    place = data.draw(st.integers(0, len(text)))
    text.insert(place, broken)
    with tempfile.TemporaryDirectory() as folder:
        lines = read_lines(write(Path(folder) / "p.txt", "\n".join(text)), {})
    kept = [(n, text[n - 1]) for n in range(1, len(text) + 1) if text[n - 1].strip()]
    assert [line.number for line in lines] == [n for n, _ in kept]
    assert [line.number for line in lines if line.fault] == [place + 1]
    expected = [request for request in requests if render_line(request)]
    assert [line.request.model_dump() for line in lines if line.request] == [
        request.model_dump() for request in expected
    ]


# --- running -----------------------------------------------------------------------------------------


def test_faults_are_told_with_their_lines_and_the_others_run(tiny: Cli, tmp_path: Path):
    path = write(tmp_path / "p.txt", "a cat --d 1\na dog --frames 6\na bird --stepz 3\na fox --d 2\n")
    ran = tiny("generate", "--from-file", path, *FLAGS, "--json")
    assert ran.code == 2
    errors = [event for event in ran.events if event["event"] == "error"]
    assert [event["where"] for event in errors] == ["line 2", "line 3"]
    assert "frames 6" in errors[0]["message"] and "--stepz" in errors[1]["message"]
    kinds = [event["event"] for event in ran.events]
    assert max(i for i, kind in enumerate(kinds) if kind == "error") < kinds.index("progress"), "all faults come first"
    results = [event for event in ran.events if event["event"] == "result"]
    assert [event["paths"] for event in results] == [["outputs/0001-a-cat-1.mp4"], ["outputs/0004-a-fox-2.mp4"]]
    assert ran.events[-1]["text"] == "2 of 4 lines are made; failed: line 2, 3"


def test_the_exit_code_is_that_of_the_first_failed_line(tiny: Cli, tmp_path: Path):
    path = write(tmp_path / "p.txt", "a cat --d 1\na dog --model nothing\na bird --frames 6\n")
    assert tiny("generate", "--from-file", path, *FLAGS).code == 3


def test_a_batch_goes_on_from_its_manifest(tiny: Cli, tmp_path: Path):
    path = write(tmp_path / "p.txt", "a cat --d 1\na dog --d 2\na fox --d 3\n")
    first = tiny("generate", "--from-file", path, *FLAGS)
    assert first.code == 0, first.err
    cat, dog, fox = first.paths
    stamps = {item: item.stat().st_mtime_ns for item in first.paths}

    again = tiny("generate", "--from-file", path, *FLAGS)
    assert (again.code, again.paths) == (0, []) and "3 of them before" in again.err

    dog.unlink()
    write(path, "# moved\na cat --d 1\na dog --d 2\na fox --d 3 --s 2\n")
    mended = tiny("generate", "--from-file", path, *FLAGS)
    assert mended.paths == [dog, Path("outputs/0004-a-fox-3.mp4")], "the vanished and the changed, not the moved"
    assert cat.stat().st_mtime_ns == stamps[cat] and fox.stat().st_mtime_ns == stamps[fox]

    fresh = tiny("generate", "--from-file", path, *FLAGS, "--fresh")
    assert len(fresh.paths) == 3 and not set(fresh.paths) & {cat, dog, fox}, "nothing is overwritten"


def test_a_changed_input_has_its_line_done_again(tiny: Cli, tmp_path: Path):
    image = picture(tmp_path / "first.png", 32, 32, seed=1)
    path = write(tmp_path / "p.txt", f"a cat --i {image} --d 1\n")
    flags = ("--model", "tiny-ti2v", "--device", "cpu", "--steps", "1")
    assert len(tiny("generate", "--from-file", path, *flags).paths) == 1
    assert tiny("generate", "--from-file", path, *flags).paths == []
    picture(image, 32, 32, seed=2)
    assert len(tiny("generate", "--from-file", path, *flags).paths) == 1


def test_inputs_count_by_what_they_hold(tmp_path: Path):
    image, folder = picture(tmp_path / "a.png"), tmp_path / "frames"
    folder.mkdir()
    picture(folder / "1.png")
    asked = [Request(middle=f"{image}@40"), Request(control=folder)]
    before = content_keys(asked)
    assert content_keys(asked) == before
    picture(image, seed=2)
    picture(folder / "1.png", seed=2)
    assert not set(content_keys(asked)) & set(before)


def test_a_line_with_its_own_file(tiny: Cli, tmp_path: Path):
    path = write(tmp_path / "p.txt", "a cat --d 1 --save films/one.mp4\na dog --d 2 --save films/one.mp4\n")
    ran = tiny("generate", "--from-file", path, *FLAGS)
    assert ran.code == 2 and ran.paths == [Path("films/one.mp4")] and "earlier line" in ran.err
    write(path, "a cat --d 1 --s 2 --save films/one.mp4\n")
    ran = tiny("generate", "--from-file", path, *FLAGS)
    assert ran.code == 0 and "its line has changed" in ran.err
    write(tmp_path / "q.txt", "a cat --d 1 --save films/one.mp4\n")
    ran = tiny("generate", "--from-file", tmp_path / "q.txt", *FLAGS)
    assert ran.code == 2 and "exists already" in ran.err, "another batch's file is not replaced"


def test_seeds_are_made_once_each(tiny: Cli, tiny_world: TinyWorld, tmp_path: Path):
    path = write(tmp_path / "p.txt", "a cat --count 3\n")
    with Engine(tiny_world.settings) as engine:
        lines = read_lines(path, BASE)
        manifest = Manifest(manifest_path(path, BASE))
        running = run_lines(engine, plan_lines(engine, lines, manifest), manifest)
        made = [next(results(running))]
        running.close()

        manifest = Manifest(manifest_path(path, BASE))
        (job,) = plan_lines(engine, lines, manifest)
        assert job.plan and len(job.plan.seeds) == 2 and made[0].seed not in job.plan.seeds
        made += list(results(run_lines(engine, [job], manifest)))
        (job,) = plan_lines(engine, lines, Manifest(manifest_path(path, BASE)))
    assert job.plan is None and job.fault is None
    assert len({result.seed for result in made}) == 3 and len({result.paths for result in made}) == 3


def results(events: Iterator[Any]) -> Iterator[Result]:
    return (happened.event for happened in events if isinstance(happened.event, Result))


def test_a_line_that_fails_while_running_costs_no_other(
    tiny_world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "p.txt", "a cat --d 1\na dog --d 2\na fox --d 3\n")
    manifest = Manifest(manifest_path(path, BASE))
    with Engine(tiny_world.settings) as engine:
        jobs = plan_lines(engine, read_lines(path, BASE), manifest)
        # A folder where the second video belongs: writing it fails after everything else has worked.
        assert jobs[1].plan
        os.makedirs(jobs[1].plan.output.paths[0][0] / "in the way")
        happened = list(run_lines(engine, jobs, manifest))
    failed = [item for item in happened if isinstance(item.event, KinemaError)]
    assert [item.line.number for item in failed] == [2]
    assert [result.seed for result in results(iter(happened))] == [1, 3]
    assert [json.loads(text)["state"] for text in manifest.path.read_text().splitlines()].count("failed") == 1


# --- the manifest ------------------------------------------------------------------------------------


def test_a_torn_line_is_told_and_costs_only_itself(tmp_path: Path):
    path = tmp_path / "out" / "p.manifest.jsonl"
    manifest = Manifest(path)
    for name in ("a", "b"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / f"{name}.mp4").write_bytes(b"x")
        manifest.started(name, 1, [7], [[tmp_path / "out" / f"{name}.mp4"]])
        manifest.made(name, 1, 7, [tmp_path / "out" / f"{name}.mp4"], 1.0)
    path.write_bytes(path.read_bytes()[:-20])
    again = Manifest(path)
    assert len(again.notes) == 1 and "line 4" in again.notes[0].text
    assert again.record("a").missing() == [] and again.record("b").missing() == [0]
    again.made("b", 1, 7, [tmp_path / "out" / "b.mp4"], 1.0)
    assert Manifest(path).record("b").missing() == []


def test_every_cut_of_a_manifest_is_read(tmp_path: Path):
    path = tmp_path / "p.manifest.jsonl"
    manifest = Manifest(path)
    (tmp_path / "a.mp4").write_bytes(b"x")
    manifest.started("a", 1, [7], [[tmp_path / "a.mp4"]])
    manifest.made("a", 1, 7, [tmp_path / "a.mp4"], 1.0)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        record = Manifest(path).record("a")
        done = bool(record.seeds) and not record.missing()
        # The last byte is only the line's end.
        assert done == (cut >= len(whole) - 1)


def test_a_manifest_moves_with_its_folder(tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.mp4").write_bytes(b"x")
    manifest = Manifest(tmp_path / "old" / "p.manifest.jsonl")
    manifest.started("a", 1, [7], [[tmp_path / "old" / "a.mp4"]])
    manifest.made("a", 1, 7, [tmp_path / "old" / "a.mp4"], 1.0)
    (tmp_path / "old").rename(tmp_path / "new")
    assert Manifest(tmp_path / "new" / "p.manifest.jsonl").record("a").missing() == []


def test_equal_lines_are_told_apart_and_neither_place_nor_memory_is_content():
    first, second = Request(prompt="a"), Request(prompt="a", save=Path("elsewhere"), vram="8GB", blocks_to_swap=20)
    keys = content_keys([first, second, Request(prompt="b"), None])
    assert keys[1] == f"{keys[0]}-2" and len(set(keys)) == 4


@pytest.mark.parametrize("name", [name for name in Request.model_fields if name not in NOT_CONTENT])
def test_every_other_field_is_content(name: str):
    values = {
        "size": "32x32",
        "solver": "euler",
        "precision": "reference",
        "output": "gif",
        "strip": True,
        "start_from_reference": True,
        "quantise": "fp8",
        "quantise_text_encoder": "int8",
        "fp8_matmul": True,
        "dtype": "float32",
        "outpaint": True,
        "boundary": 0.5,
        "lora_mode": "fuse",
        "control_scale": 0.5,
        "keep_audio": True,
        "overlap": 5,
        "strength": 0.5,
    }
    changed = Request(
        **{name: values.get(name, "64" if name not in ("reference", "control_image", "control_mask") else "x")}
    )
    assert content_keys([changed]) != content_keys([Request()])
