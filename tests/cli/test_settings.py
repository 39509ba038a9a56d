"""Flag, environment, configuration file, default: each wins over the next, for settings and for fields."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import Cli
from kinema.errors import RequestError
from kinema.request import make_request, merge
from kinema.schema import Plan, Request
from kinema.settings import Configuration, configure, default_config_path, default_settings, variable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a configuration file."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def folders(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).mkdir()
    return [root / name for name in names]


def test_the_default_is_used_where_nothing_is_said(home: Path):
    found = configure({})
    assert found.settings == default_settings() and found.file is None
    assert found.defaults == {} and set(found.sources.values()) == {"default"}


def test_the_file_wins_over_the_default(home: Path):
    (inside,) = folders(home, "inside")
    config = write(default_config_path(), f'models = ["{inside}"]\ncache = "kept"\n[defaults]\nsteps = 7\n')
    found = configure({})
    assert found.file == config
    assert found.settings.models == (inside,) and found.settings.cache == config.parent / "kept"
    assert found.defaults == {"steps": 7} and str(config) in found.sources["steps"]


def test_the_environment_wins_over_the_file(home: Path):
    in_file, first, second = folders(home, "file", "first", "second")
    config = write(home / "c.toml", f'models = ["{in_file}"]\n[defaults]\nsteps = 7\nshift = 2.0\n')
    environment = {"KINEMA_CONFIG": str(config), "KINEMA_MODELS": f"{first}{os.pathsep}{second}", "KINEMA_STEPS": "8"}
    found = configure(environment)
    assert found.settings.models == (first, second) and found.sources["models"] == "environment KINEMA_MODELS"
    assert make_request(found.defaults) == Request(steps=8, shift=2.0)


def test_the_flag_wins_over_the_environment(home: Path):
    in_environment, flagged = folders(home, "environment", "flagged")
    found = configure({"KINEMA_MODELS": str(in_environment)}, models=(flagged,), cache=home / "c")
    assert found.settings.models == (flagged,) and found.settings.cache == home / "c"
    assert found.sources["models"] == found.sources["cache"] == "flag"


def test_the_config_flag_wins_over_the_config_variable(home: Path):
    named = write(home / "named.toml", "[defaults]\nsteps = 3\n")
    other = write(home / "other.toml", "[defaults]\nsteps = 4\n")
    assert configure({"KINEMA_CONFIG": str(other)}, config=named).defaults == {"steps": 3}
    assert configure({"KINEMA_CONFIG": str(other)}).defaults == {"steps": 4}


@pytest.mark.parametrize("places", range(1, 4))
def test_every_step_of_the_order_through_the_command_line(tiny: Cli, tmp_path: Path, monkeypatch: Any, places: int):
    """With one, two and three places that say steps, the highest is planned; flag 5, environment 4, file 3."""
    config = write(tmp_path / "c.toml", "[defaults]\nsteps = 3\nmodel = 'tiny-t2v'\n")
    monkeypatch.setenv("KINEMA_CONFIG", str(config))
    flags = []
    if places > 1:
        monkeypatch.setenv("KINEMA_STEPS", "4")
    if places > 2:
        flags = ["--steps", "5"]
    ran = tiny("plan", "a cat", "--json", *flags)
    assert ran.code == 0, ran.out
    assert len(Plan.model_validate_json(ran.out).steps) == 2 + places


def test_every_field_has_its_variable(home: Path):
    for name in Request.model_fields:
        assert variable(name) == f"KINEMA_{name.upper()}"
    found = configure({"KINEMA_GUIDANCE_HIGH": "4", "KINEMA_OVERWRITE": "true", "KINEMA_OUTPUT": "mp4,latents"})
    assert make_request(found.defaults) == Request(guidance_high=4, overwrite=True, output=("mp4", "latents"))


def test_home_is_meant_in_the_variables_of_the_hub(home: Path):
    hub = configure({"HF_HOME": "~/hub", "HF_TOKEN_PATH": "~/token"}).settings
    assert hub.hub.token_file == Path.home() / "token" and hub.hub_caches == (Path.home() / "hub/hub",)


def test_an_empty_variable_is_not_set(home: Path):
    assert configure({"KINEMA_STEPS": "", "KINEMA_CONFIG": "", "KINEMA_MODELS": ""}).sources["models"] == "default"


@pytest.mark.parametrize(
    ("upper", "kept"),
    [
        ({"seconds": 2}, {"seed", "count"}),
        ({"seeds": (1, 2)}, {"frames"}),
        ({"seed": 3}, {"frames", "count"}),
        ({"steps": 3}, {"frames", "seed", "count"}),
    ],
)
def test_a_higher_place_drops_what_contradicts_it(upper: dict[str, Any], kept: set[str]):
    lower = {"frames": 81, "seed": 1, "count": 2}
    assert merge(lower, upper).keys() == kept | upper.keys()


def test_a_variable_nobody_reads_is_told(home: Path):
    (note,) = configure({"KINEMA_GUIDENCE": "3"}).notes
    assert "KINEMA_GUIDENCE" in note.text and "KINEMA_GUIDANCE" in note.text


def test_the_home_folder_is_expanded_and_paths_count_from_the_file(home: Path):
    near, far = folders(home, "near", "far")
    config = write(home / "c.toml", 'models = ["near", "~/far"]\n')
    assert configure({}, config=config).settings.models == (near, far)


FAULTS = {
    "missing file": (None, "does not exist"),
    "not TOML": ("models = [", "not TOML"),
    "not UTF-8": (b"\xff\xfe", "not TOML"),
    "unknown key": ('modles = ["x"]\n', "did you mean 'models'"),
    "field outside defaults": ("steps = 3\n", "outside [defaults]"),
    "unknown field": ("[defaults]\nguidence = 3\n", "did you mean 'guidance'"),
    "bad value": ("[defaults]\nsteps = 0\n", "steps 0 is below 1"),
    "bad type": ("models = 3\n", "not a list of paths"),
    "two caches": ('cache = ["a", "b"]\n', "not one path"),
    "defaults no table": ("defaults = 3\n", "not a table"),
    "folder that is not there": ('models = ["nowhere"]\n', "does not exist"),
    "catalog that is not there": ('catalogs = ["none.toml"]\n', "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_configuration_file(home: Path, fault: str):
    text, words = FAULTS[fault]
    path = home / "c.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError) as caught:
        configure({"KINEMA_CONFIG": str(path)})
    assert words in caught.value.message
    assert fault in ("folder that is not there", "catalog that is not there") or str(path) in caught.value.message


def test_a_bad_variable_says_where_it_stands(home: Path):
    with pytest.raises(RequestError, match=r"environment.*steps 0"):
        configure({"KINEMA_STEPS": "0"})


def test_doctor_says_where_each_setting_came_from(tiny: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINEMA_STEPS", "3")
    settings = json.loads(tiny("doctor", "--json").out)["settings"]
    assert settings["steps"] == "3 (environment KINEMA_STEPS)" and "environment KINEMA_MODELS" in settings["models"]


def test_configuration_is_a_value():
    assert Configuration(default_settings()) == Configuration(default_settings())
