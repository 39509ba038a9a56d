"""What a LoRA file is, and LoRA files made of others: the verbs of `kinema lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kinema.cli.flags import Call, option
from kinema.cli.interrupt import Interruption
from kinema.cli.tell import make_teller, told
from kinema.errors import RequestError
from kinema.lora import parse_loras
from kinema.schema import Note

DTYPES = ("float32", "bfloat16", "float16")

Source = Annotated[Path, option("a LoRA file or PEFT folder", "FILE")]
Target = Annotated[Path, option("the file to write, .safetensors", "OUT")]
Names = Annotated[str, Parameter(help="names to write: comfyui, lightx2v, kohya, videox-fun, peft, diffusers, ...")]
Overwrite = Annotated[bool, option("replace OUT if it exists")]


def lora_inspect(
    call: Call,
    *files: Annotated[Path, option("LoRA files or PEFT folders", "FILE")],
    dit: Annotated[Path | None, option("a model: what matches, and by how much it changes")] = None,
) -> int:
    """Say what LoRA files are: names, kinds, ranks, scales; and against a model, what matches and what does not."""
    if not files:
        raise RequestError("no file to inspect", "type: kinema lora inspect FILE", field="FILE", got=None)
    from kinema.cli.lora_pages import described
    from kinema.weights.lora.weights import Weights

    weights = Weights(dit) if dit else None
    with make_teller(call.json) as teller:
        for path in files:
            teller.show(*described(path, weights))
    return 0


def lora_convert(call: Call, source: Source, target: Target, /, *, to: Names, overwrite: Overwrite = False) -> int:
    """Write a LoRA in another publisher's names, and read it back to be the same change."""
    from kinema.weights.lora.convert import convert_lora

    with make_teller(call.json) as teller, Interruption() as cancelled:
        told(convert_lora(source, target, to, overwrite=overwrite), teller, cancelled)
        teller.show(str(target), {"path": str(target), "dialect": to})
    return 0


def lora_merge(
    call: Call,
    model: Annotated[Path, option("the DiT file or folder", "MODEL")],
    target: Annotated[Path, option("the file to write, .safetensors or .gguf", "OUT")],
    /,
    *,
    lora: Annotated[tuple[str, ...], option("as in generate, FILE:0.8,only=PATTERN; several times")],
    to: Annotated[str | None, option("format of the numbers, as of kinema convert")] = None,
    names: Annotated[str | None, option("names of the tensors, as of kinema convert")] = None,
    overwrite: Overwrite = False,
) -> int:
    """Write a model with LoRAs added to its weights."""
    from kinema.weights.lora.merge import merge

    try:
        refs = parse_loras(list(lora))
    except ValueError as error:
        raise RequestError(str(error), "correct --lora", field="lora", got=list(lora)) from error
    with make_teller(call.json) as teller, Interruption() as cancelled:
        made, changes = told(merge(model, refs, target, to, names, overwrite=overwrite), teller, cancelled)
        for note in made.notes:
            teller.event(note)
        for ref, size in zip(refs, changes, strict=True):
            teller.event(Note(about="lora", text=f"{ref.path.name} at strength 1 changes the weights by {size:.2%}"))
        teller.show(str(target), {"path": str(target), "changes": list(changes), "error": made.proof.error})
    return 0


def lora_extract(
    call: Call,
    base: Annotated[Path, option("the model to begin from", "BASE")],
    tuned: Annotated[Path, option("the model to arrive at", "TUNED")],
    target: Target,
    /,
    *,
    rank: Annotated[int, Parameter(help="rank of the matrices")] = 64,
    to: Names = "comfyui",
    dtype: Annotated[str, Parameter(help="float32, bfloat16 or float16")] = "bfloat16",
    overwrite: Overwrite = False,
) -> int:
    """Write the LoRA that turns one model into another, as nearly as its rank can, and say what it leaves out."""
    import torch

    from kinema.weights.lora.extract import extract

    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}", "pass --dtype bfloat16",
                           field="dtype", got=dtype, allowed=DTYPES)  # fmt: skip
    with make_teller(call.json) as teller, Interruption() as cancelled:
        making = extract(base, tuned, target, rank=rank, to=to, dtype=getattr(torch, dtype), overwrite=overwrite)
        found = told(making, teller, cancelled)
        text = f"{found.matrices} matrices at rank {rank}, {found.others} differences; "
        text += f"{found.lost:.2%} of the change is left out"
        teller.event(Note(about="lora", text=text))
        data = {"path": str(target), "matrices": found.matrices, "others": found.others, "lost": found.lost}
        teller.show(str(target), data)
    return 0
