"""Importing Kinema does nothing but define things: no device, no settings, no folders, no network, no reading of argv.

Each check runs in a fresh interpreter. Third-party packages are imported first, as their own habits are not ours;
then the traps are set, and every module of the package is imported.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.version import VERSION

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"

PROBE = r"""
import contextlib, importlib, io, json, logging, os, sys, threading
names, libraries = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for library in libraries:
    with contextlib.suppress(ImportError):
        importlib.import_module(library)

faults, importing = [], [""]
def report(what):
    faults.append(f"{importing[0]}: {what}")

EVENTS = {"os.mkdir", "os.putenv", "os.unsetenv", "os.remove", "os.rename", "subprocess.Popen", "os.system"}
def watch(event, args):
    if not importing[0]:
        return
    if event in EVENTS or event.startswith("socket."):
        # Bytecode caches are Python's own doing.
        if "__pycache__" not in str(args):
            report(f"{event} {args[:1]}")
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        report(f"writes {args[0]}")
sys.addaudithook(watch)

class Argv(list):
    def _read(self, *args):
        report("reads sys.argv")
        return []
    __iter__ = __getitem__ = _read
    def __len__(self):
        report("reads sys.argv")
        return 0
sys.argv = Argv()

torch = sys.modules.get("torch")
if torch is not None:
    def trap(name, function):
        def called(*args, **kwargs):
            report(f"calls torch.cuda.{name}")
            return function(*args, **kwargs)
        return called
    for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
        setattr(torch.cuda, name, trap(name, getattr(torch.cuda, name)))

def state():
    now = {"environment": dict(os.environ), "folder": os.getcwd(), "handlers": list(logging.root.handlers),
           "log level": logging.root.level, "threads": threading.active_count(), "path": list(sys.path)}
    if torch is not None:
        now |= {"default dtype": torch.get_default_dtype(), "threads of torch": torch.get_num_threads(),
                "gradients": torch.is_grad_enabled(), "seed": torch.initial_seed()}
    return now

printed = io.StringIO()
for name in names:
    before = state()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        importing[0] = name
        importlib.import_module(name)
        importing[0] = ""
    after = state()
    faults += [f"{name}: changes the {key}" for key in before if before[key] != after[key]]
    if printed.getvalue():
        faults.append(f"{name}: prints {printed.getvalue()!r}")
        printed.truncate(0)
print(json.dumps(faults), file=sys.__stdout__)
"""


def package_modules() -> list[str]:
    paths = sorted(SOURCE.rglob("kinema/**/*.py"))
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def third_party() -> list[str]:
    """Every package that some module imports at its top level, submodules included (torch.nn.functional)."""
    found: set[str] = set()
    for path in SOURCE.rglob("kinema/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module)
    return sorted(name for name in found if name.split(".")[0] not in ("kinema", "__future__"))


def probe(names: list[str], libraries: list[str], folder: Path, path: Path = SOURCE) -> list[str]:
    """Return what importing `names` did besides defining things, one line each."""
    command = [sys.executable, "-c", PROBE, json.dumps(names), json.dumps(libraries)]
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_no_module_does_anything_at_import(tmp_path: Path):
    assert probe(package_modules(), third_party(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import os\nos.environ['KINEMA_PLANTED'] = '1'", "os.putenv"),
        ("import os\nos.makedirs('planted')", "os.mkdir"),
        ("open('planted.txt', 'w').close()", "writes planted.txt"),
        ("import logging\nlogging.basicConfig()", "changes the handlers"),
        ("import socket\nsocket.socket()", "socket."),
        ("import sys\nprompt = sys.argv[1:]", "reads sys.argv"),
        ("import torch\ndevice = torch.cuda.is_available()", "torch.cuda.is_available"),
        ("import torch\ntorch.manual_seed(0)", "changes the seed"),
        ("print('planted')", "prints"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
    ],
)
def test_a_planted_side_effect_is_caught(text: str, fault: str, tmp_path: Path):
    folder, path = tmp_path / "run", tmp_path / "path"
    folder.mkdir()
    path.mkdir()
    (path / "planted.py").write_text(text + "\n")
    libraries = ["torch"] if "torch" in text else ["logging", "socket", "subprocess"]
    faults = probe(["planted"], libraries, folder, path)
    assert any(fault in line for line in faults), faults


LIGHT = """
import json, sys, time
start = time.process_time()
import kinema
seconds = time.process_time() - start
heavy = [name for name in ("torch", "numpy", "transformers", "av", "PIL", "rich", "cyclopts") if name in sys.modules]
print(json.dumps([seconds, heavy]))
"""


def test_importing_kinema_is_light():
    runs = [subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    seconds, heavy = zip(*(json.loads(run.stdout) for run in runs), strict=True)
    assert heavy[0] == []
    # Processor time, so that a busy machine does not fail it; pydantic is most of it.
    assert min(seconds) < 1.5


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from checkpoints import TINY
from kinema.weights.structure import build
for component, config in TINY.items():
    build(component, config)
print([name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""


def test_reading_headers_loads_no_compiler():
    command = [sys.executable, "-c", BUILD, str(ROOT / "tests")]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "[]"


FORBIDDEN_BELOW_CLI = {
    "os.environ": "reads the environment",
    "os.getenv": "reads the environment",
    "os.putenv": "writes the environment",
    "sys.argv": "reads the command line",
    "sys.stdout": "prints",
    "sys.stderr": "prints",
    "logging.basicConfig": "configures logging",
    "torch.set_default_device": "sets a process-wide default",
    "torch.set_default_dtype": "sets a process-wide default",
    "torch.manual_seed": "seeds the process-wide generator",
}


def reaches_outside(text: str) -> list[str]:
    """Return one line for each use of what only the clients may touch, also inside functions."""
    faults = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in FORBIDDEN_BELOW_CLI:
                faults.append(f"line {node.lineno}: {name} {FORBIDDEN_BELOW_CLI[name]}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            faults += [
                f"line {node.lineno}: {name} {FORBIDDEN_BELOW_CLI[name]}"
                for name in names
                if name in FORBIDDEN_BELOW_CLI
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"):
            faults.append(f"line {node.lineno}: {node.func.id}() belongs to a client")
    return faults


def test_only_clients_touch_the_outside():
    below = [
        path
        for path in SOURCE.rglob("kinema/**/*.py")
        if not path.relative_to(SOURCE / "kinema").parts[0].startswith("cli")
    ]
    faults = {str(path.relative_to(SOURCE)): reaches_outside(path.read_text()) for path in below}
    assert {path: lines for path, lines in faults.items() if lines} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import os\ndef f():\n    return os.environ.get('HOME')",
        "from os import getenv",
        "def f():\n    print('done')",
        "import torch\ntorch.manual_seed(1)",
        "import sys\ndef f():\n    sys.stderr.write('x')",
    ],
)
def test_a_planted_reach_is_caught(text: str):
    assert reaches_outside(text)


def test_the_version_is_one_string():
    assert VERSION.count(".") == 2
