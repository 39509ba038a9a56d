"""The words of the command line as the documents may use them: verbs, flags, short names of prompt files.

Flags of a request come from `schema.Request`; the literal lists below are what the command line adds.
"""

from __future__ import annotations

from kinema.schema import Request

VERBS = frozenset(
    {
        "generate",
        "plan",
        "inspect",
        "convert",
        "doctor",
        "replay",
        "decode",
        "resume",
        "demo",
        "models",
        "models search",
        "models show",
        "models plan",
        "models pull",
        "models verify",
        "models where",
        "models du",
        "models paths",
        "models import",
        "models migrate",
        "models prune",
        "control",
        "drive",
        "lora inspect",
        "lora convert",
        "lora merge",
        "lora extract",
    }
)

HEADS = frozenset(verb.split()[0] for verb in VERBS)
"""First words of verbs."""

CLI_FLAGS = frozenset(
    {
        "--interactive",
        "--to",
        "--names",
        "--from-file",
        "--json",
        "--fresh",
        "--then",
        "--low",
        "--high",
        "--threshold",
        "--weights",
        "--detector",
        "--points",
        "--replace",
        "--neutral",
        "--sam2",
        "--no-retarget",
        "--columns",
        "--rows",
        "--allow-changed",
        "--image",
        "--config",
        "--models-dir",
        "--catalog",
        "--cache-dir",
        "--extra-model-paths",
        "--task",
        "--disk",
        "--loras",
        "--source",
        "--full",
        "--yes",
        "--link",
        "--pull",
        "--help",
        "--version",
        "--rank",
    }
)

REQUEST_FLAGS = frozenset("--" + name.replace("_", "-") for name in Request.model_fields)

SHORT_NAMES = {
    "w": "size",
    "h": "size",
    "f": "frames",
    "d": "seed",
    "s": "steps",
    "g": "guidance",
    "l": "guidance",
    "fs": "shift",
    "i": "first",
    "ei": "last",
    "cn": "control",
    "n": "negative",
    "ci": "control_image",
    "cim": "control_mask",
    "of": "one_frame",
}
"""Short name of a prompt file -> field of the request; w and h are the two halves of size."""

FLAGS = REQUEST_FLAGS | CLI_FLAGS | {"--" + name for name in SHORT_NAMES}
