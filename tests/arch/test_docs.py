"""The documents say what is so: links resolve, snippets parse, commands exist, the reference page equals --help."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_words import FLAGS, VERBS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "recipes").glob("**/*.md")])
CLI_PAGE = ROOT / "docs" / "cli.md"
CLI_PAGE_SCRIPT = ROOT / "docs" / "make_cli_page.py"
"""Writes docs/cli.md from the schema and the command line; its `page()` returns the text."""

PENDING: set[str] = set()
"""Files that pages link to and that are still to be made. Strict: one that exists must leave this list."""

EXCUSED = {"LICENSE"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Yield (language, line, code) for every fenced block."""
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        indent, language, code = match.groups()
        line = text[: match.start()].count("\n") + 1
        yield language, line, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings as web hosts of repositories build them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            if not (path.is_relative_to(ROOT) and relative(path) in PENDING):
                faults.append(f"{target} leads nowhere")
        elif anchor and anchor not in anchors(text if not name else path.read_text()):
            faults.append(f"{target}: no such heading")
    return faults


def broken_snippets(text: str) -> list[str]:
    """Return python that does not parse, shell that does not parse, and kinema commands that do not exist."""
    faults = []
    for language, line, code in blocks(text):
        if language == "python":
            try:
                ast.parse(code)
            except SyntaxError as error:
                faults.append(f"line {line}: {error}")
        elif language in ("bash", "sh"):
            check = subprocess.run([shutil.which("bash") or "sh", "-n"], input=code, capture_output=True, text=True)
            faults += [f"line {line}: {check.stderr.strip()}"] if check.returncode else []
            faults += [f"line {line}: {fault}" for fault in unknown_words(code)]
    faults += [fault for code in re.findall(r"`(kinema [^`]+)`", prose(text)) for fault in unknown_words(code)]
    return faults


def unknown_words(code: str) -> list[str]:
    """Return verbs and flags of `kinema ...` commands that the command line does not have."""
    faults = []
    for command in re.sub(r"\\\n", " ", code).splitlines():
        try:
            words = shlex.split(command, comments=True)
        except ValueError as error:
            faults.append(f"{command}: {error}")
            continue
        words = words[[Path(word).name for word in words].index("kinema") :] if "kinema" in command else []
        if len(words) > 1 and not {words[1], " ".join(words[1:3])} & VERBS and not words[1].startswith("-"):
            faults.append(f"kinema {' '.join(words[1:3])} does not exist")
        flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        faults += [f"{flag} does not exist" for flag in flags if flag not in FLAGS]
    return faults


MACHINE_PATH = re.compile(r"(?<![\w.~:/])/(?:home|root|Users|work|farm|opt|srv|mnt|tmp)/[\w.-]+")
INDEX_HOST = re.compile(r"\b(?:pypi|pythonhosted|npmjs)\.org\b|\bdownload\.pytorch\.")


def machine_words(text: str) -> list[str]:
    """Return paths of somebody's machine, and hosts of package indexes: pip's own configuration names those."""
    return [match.group() for pattern in (MACHINE_PATH, INDEX_HOST) for match in pattern.finditer(text)]


def tracked_texts() -> list[Path]:
    names = ("*.py", "*.md", "*.toml", "*.txt", "*.yaml", "*.yml", "*.sh", "*.json", "Makefile", ".ci/*")
    listed = subprocess.run(["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True)
    found = [ROOT / name for name in listed.stdout.split("\n") if name]
    # A release archive has no git: look at the pages and the sources then.
    return [path for path in found if path.is_file()] or [*PAGES, *(ROOT / "src").rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_snippets_parse(page: Path):
    assert broken_snippets(page.read_text()) == []


def test_no_text_names_a_machine():
    faults = {relative(path): machine_words(path.read_text(errors="ignore")) for path in tracked_texts()}
    assert {name: words for name, words in faults.items() if words and Path(name).name not in EXCUSED} == {}


def test_what_is_pending_is_really_missing():
    assert [name for name in sorted(PENDING) if (ROOT / name).exists()] == [], "made now: take it out of PENDING"


@pytest.mark.skipif(not CLI_PAGE_SCRIPT.exists(), reason="the command line's reference page is not generated yet")
def test_the_reference_page_equals_the_command_line():
    spec = importlib.util.spec_from_file_location("make_cli_page", CLI_PAGE_SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert CLI_PAGE.read_text() == script.page(), "run: .venv/bin/python docs/make_cli_page.py"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nwith kinema.Engine() as engine\n```",
        "```bash\nif true; then\n```",
        "```bash\nkinema generat 'a cat'\n```",
        "```bash\nkinema generate 'a cat' \\\n  --num-frames 81\n```",
        "Type `kinema undo`.",
        "Type `kinema lora undo x.safetensors`.",
    ],
)
def test_a_planted_snippet_is_caught(text: str):
    assert broken_snippets(text)


def test_a_planted_link_is_caught():
    page = ROOT / "README.md"
    assert broken_links(page, "[x](docs/nowhere.md)") and broken_links(page, "# A\n[x](#b)")
    assert not broken_links(page, "# A b\n[x](#a-b) [y](LICENSE) [z](https://example.org)")


def test_a_planted_path_is_caught():
    assert machine_words("see " + "/".join(["", "home", "someone", "models"]))
    assert machine_words("pip install -i https://" + "pypi" + ".org/simple")
    assert not machine_words("see ~/models, models/vae, a/home/b and https://example.org/home/x")
