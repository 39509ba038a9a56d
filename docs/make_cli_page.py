"""Write docs/cli.md and docs/request.schema.json from what the command line and the schema declare.

.venv/bin/python docs/make_cli_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from inspect import Parameter, getdoc
from pathlib import Path
from typing import Any

from kinema import errors
from kinema.batch.lines import SHORT_NAMES
from kinema.cli.app import COMMANDS
from kinema.cli.flags import parameters, spellings
from kinema.schema import Request
from kinema.settings import CONFIG_VARIABLE, PLACES, variable

DOCS = Path(__file__).parent

HEAD = """# Command line

Made by `docs/make_cli_page.py` from the declarations in `schema/request.py` and `cli/`; do not edit it by hand.

"""

PRECEDENCE = """## Settings

Every field of a request can be set in four places. The first that says something wins:

1. a flag, `--guidance-high 4`
2. an environment variable, `KINEMA_GUIDANCE_HIGH=4`
3. the configuration file, `guidance_high = 4` under `[defaults]`
4. the default, mostly the model's own

A field drops what contradicts it from a lower place: `--seconds 3` a configured `frames`, `--seeds 1,2` a
configured `seed`. An empty environment variable counts as not set, one that Kinema does not read is told. In
the configuration file, `models`, `catalogs` and `cache` count from the file's own folder, paths under
`[defaults]` from where the command runs; unknown keys are errors. `kinema doctor` prints what was read, and
from where.

"""

BATCH = """## Prompt files

`kinema generate --from-file FILE` reads one request a line of a `.txt` file, one object a line of `.jsonl`, one
row a request of `.csv` (the first line names the columns; `;` between several paths), or a folder of images,
each the first frame of a video whose prompt is in the `.txt` file of the same name, or in `--prompt`. Flags are
the defaults of all lines. In `.txt`:

- An option begins where white space is followed by `--` and a letter. All fields have their long names,
  `--guidance-high 4`.
- Double quotes around the prompt or a value keep everything inside, `\\"` and `\\\\` are a quote and a
  backslash there. Quotes inside prose protect dashes too. Apostrophes are letters.
- Lines that are blank or begin with `#` are left out. Paths count from where the command runs.

| short | field |
|---|---|
"""

MANIFEST = """
All lines are planned first and every fault is told with its line; the others run. Outputs without a name of
their own get the number of the line in front. A manifest beside the outputs, `FILE.manifest.jsonl`, records
what is made: the same command again makes only what is missing, changed or failed. `--fresh` forgets it. The
exit code is that of the first failed line.

"""

EXITS = """## Exit codes

| code | error | |
|---|---|---|
| 0 | | done |
"""

JSON_HEAD = """
With `--json` every event is one object a line on stdout: `event` is `progress`, `preview`, `note`, `result` or `error`;
`where` names the line of a batch. `plan`, `inspect`, `doctor` and `models` print their data as one object.
"""


def page() -> str:
    """Return the text of docs/cli.md."""
    verbs = "".join(_verb(name) for name in COMMANDS)
    shorts = "".join(f"| `--{short}` | `{field}` |\n" for short, field in SHORT_NAMES.items())
    return HEAD + verbs + PRECEDENCE + _places() + BATCH + shorts + MANIFEST + EXITS + _exits() + JSON_HEAD


def schema() -> str:
    """Return the text of docs/request.schema.json."""
    return json.dumps(Request.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def _verb(name: str) -> str:
    command = COMMANDS[name]
    if name == "plan":
        return f"## kinema plan\n\n{getdoc(command.verb)} It takes the flags of `kinema generate`.\n\n"
    shown = [item for item in parameters(command.verb, command.fields) if _group(item) != "Settings"]
    words = [spellings(item)[0] for item in shown if item.kind is not Parameter.KEYWORD_ONLY]
    usage = " ".join(["kinema", name, *words])
    usage = usage.replace("--prompt", "[PROMPT]").replace("inspect FILE", "inspect FILE...")
    text = f"## kinema {name}\n\n{getdoc(command.verb)}\n\n```text\n{usage} [FLAGS]\n```\n\n"
    groups = dict.fromkeys(_group(item) for item in shown)
    tables = [_table(group, [item for item in shown if _group(item) == group]) for group in groups]
    return text + "".join(tables)


def _table(group: str, items: Sequence[Parameter]) -> str:
    rows = "".join(f"| `{'`, `'.join(spellings(item))}` | {_option(item).help} |\n" for item in items)
    title = f"### {group}\n\n" if group else ""
    return f"{title}| | |\n|---|---|\n{rows}\n"


def _option(item: Parameter) -> Any:
    return item.annotation.__metadata__[0]


def _group(item: Parameter) -> str:
    groups = _option(item).group
    return groups[0].name if groups and groups[0] else ""


def _places() -> str:
    rows = "".join(f"| `{flag}` | `{key}` | `{name}` | {text} |\n" for name, (key, flag, text) in PLACES.items())
    fields = f"| every field, `--seed` | `{variable('seed')}` and so on | `seed` under `[defaults]` | as the flag |\n"
    config = f"| `--config` | `{CONFIG_VARIABLE}` | | the configuration file itself |\n"
    return "| flag | environment | configuration file | |\n|---|---|---|---|\n" + rows + config + fields + "\n"


def _exits() -> str:
    kinds: list[Callable[..., Any]] = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KinemaError)
    ]
    rows = sorted((kind.exit_code, kind.__name__, (getdoc(kind) or "").split(". ")[0]) for kind in kinds)
    return "".join(f"| {code} | `{name}` | {text.rstrip('.')} |\n" for code, name, text in rows)


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(page())
    (DOCS / "request.schema.json").write_text(schema())
