"""The flags are the schema: every field has one, the pages are generated, and what is unknown is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from cli_words import CLI_FLAGS, VERBS
from conftest import Cli
from kinema.cli.app import COMMANDS
from kinema.cli.flags import ALIASES, ELSEWHERE, GROUPS, flag_names, parameters
from kinema.schema import Request, parse_bytes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli_page", DOCS / "make_cli_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_the_generated_one(script: ModuleType):
    assert (DOCS / "cli.md").read_text() == script.page(), "run: .venv/bin/python docs/make_cli_page.py"


def test_the_json_schema_is_the_generated_one(script: ModuleType):
    assert (DOCS / "request.schema.json").read_text() == script.schema(), "run: .venv/bin/python docs/make_cli_page.py"


@pytest.mark.parametrize("verb", ["generate", "plan"])
def test_every_field_is_a_flag_with_its_own_words(verb: str):
    made = {
        item.name: item.annotation.__metadata__[0] for item in parameters(COMMANDS[verb].verb, COMMANDS[verb].fields)
    }
    for name, field in Request.model_fields.items():
        assert made[name].name[0] == "--" + name.replace("_", "-")
        assert made[name].help == field.description and isinstance(field.json_schema_extra, dict)
        assert made[name].group[0].name == GROUPS[str(field.json_schema_extra["group"])]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "models"])
def test_help_shows_every_flag(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("COLUMNS", "200")
    shown = cli(*name.split(), "--help").out
    assert [
        flag for flag in flag_names(parameters(COMMANDS[name].verb, COMMANDS[name].fields)) if flag not in shown
    ] == []


def test_the_documents_know_these_verbs_and_flags():
    assert set(COMMANDS) == VERBS
    flags = {flag for command in COMMANDS.values() for flag in flag_names(parameters(command.verb, command.fields))}
    own = {flag for flag in flags if flag.startswith("--")} - {
        "--" + name.replace("_", "-") for name in Request.model_fields
    }
    assert own | {"--help", "--version"} == CLI_FLAGS
    assert ALIASES.keys() <= Request.model_fields.keys()


def test_flags_of_other_programs_lead_to_ours():
    known = {"--" + name.replace("_", "-") for name in Request.model_fields}
    assert not {"--" + name for name in ELSEWHERE} & known
    assert {target.split()[0] for target in ELSEWHERE.values()} <= known


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generat", "x"], ["'generat'", "kinema generate"]),
        (["a cat walks"], ["'a cat walks'", 'kinema generate "a cat walks"']),
        (["--stepz", "3"], ["--stepz", "kinema --help"]),
        (["generate", "x", "--stepz", "3"], ["--stepz", "--steps"]),
        (["generate", "x", "--widht", "832"], ["--widht", "--size WIDTHxHEIGHT"]),
        (["generate", "x", "--infer_steps", "30"], ["--infer_steps", "--steps"]),
        (["generate", "x", "--steps"], ["--steps", "requires an argument"]),
        (["generate", "x", "--steps", "3", "--steps", "4"], ["--steps", "multiple"]),
        (["generate", "a", "cat", "walks"], ["cat", "quotes"]),
        (["generate", "x", "--interactive", "--from-file", "p.txt"], ["p.txt", "--interactive"]),
        (["generate", "x", "--fresh"], ["--fresh", "--from-file"]),
        (["decode", "x", "--seed", "3"], ["--seed", "kinema decode"]),
        (["replay"], ["FILE", "kinema replay --help"]),
        (["inspect"], ["no file", "kinema inspect FILE"]),
    ],
)
def test_faults_of_the_command_line(cli: Cli, argv: list[str], words: list[str]):
    ran = cli(*argv)
    assert ran.code == 2 and ran.out == ""
    assert all(word in ran.err for word in words), ran.err
    ran = cli(*argv, "--json")
    assert ran.code == 2 and ran.error["error"] == "RequestError" and ran.err == ""


def test_all_bad_values_are_told_at_once(cli: Cli):
    ran = cli("generate", "x", "--steps", "0", "--solver", "unipcc", "--quality", "101", "--size", "832")
    assert ran.code == 2
    for words in ("steps 0 is below 1", "did you mean 'unipc'", "quality 101 is above 100", "size '832'"):
        assert words in ran.err


@pytest.mark.parametrize(
    ("text", "amount"),
    [("16", 16e9), ("16GB", 16e9), ("11.5 gib", 11.5 * 2**30), ("800MB", 8e8), ("800000000b", 8e8), ("24g", 24e9)],
)
def test_an_amount_of_memory_means_one_thing_to_every_verb(text: str, amount: float) -> None:
    assert Request(vram=text).vram == parse_bytes(text) == amount  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["16000000000", "12i", "GB", "1.5.2GB", "-3GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="12GB"):
        parse_bytes(text)
