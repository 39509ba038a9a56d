"""How the large matrices of each model are held: as the file has them, or rounded when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

from kinema.errors import MachineError, RequestError
from kinema.schema import Expert, FileFacts, Machine, ModelRef, Note, Quantise, Request, flag

BITS: Mapping[Quantise, float] = {"fp8": 8, "fp8-64": 8.5, "int8": 8}
"""Bits of a weight with its share of a scale; one scale a row is less than a hundredth of a bit."""

CHUNK_BYTES = 3 * 4 * 2**22
"""Float32 numbers that are alive while a chunk is unpacked or rounded."""


def quantised(ref: ModelRef, file: FileFacts, wanted: Quantise | None, field: str, notes: list[Note]) -> ModelRef:
    """Return the recipe with its matrices held as wanted.

    Raises RequestError for a file that holds them packed already, or whose rows do not divide into the parts wanted.
    """
    if wanted is not None and file.quantisation:
        raise RequestError(
            f"{field} {wanted}: {file.path} is quantised already ({file.quantisation}); rounding twice only loses more",
            f"leave {flag(field)} out, or take the fp16 or bf16 file",
            field=field,
            got=wanted,
        )
    if wanted is None:
        if "plain" in file.quantisation and file.component in ("dit", "flux_dit"):
            text = f"{file.path.name} is {file.quantisation}: its norms and biases are rounded to fp8 as well; "
            notes.append(
                Note(about=field, text=text + "a scaled fp8 or Q8_0 file of the same size is closer to the model")
            )
        return ref
    if wanted == "fp8-64" and file.matrix_width % 64:
        raise RequestError(
            f"{field} {wanted}: rows of {file.path.name} do not divide into parts of 64 weights, only of "
            f"{file.matrix_width}",
            f"pass {flag(field)} fp8",
            field=field,
            got=wanted,
        )
    share = file.matrix_parameters / max(1, file.parameters)
    text = f"{share:.0%} of the weights of {file.path.name} are rounded to {wanted} when loaded"
    notes.append(Note(about=field, text=text))
    return rounded(ref, wanted)


def rounded(ref: ModelRef, how: Quantise) -> ModelRef:
    """Return the recipe of a plain file, its large matrices rounded when they are loaded."""
    count = ref.matrix_parameters
    packed = {"packed_parameters": count, "packed_bytes": round(count * BITS[how] / 8)}
    return ref.model_copy(update={"quantisation": how, **packed})


def multiplied(
    refs: Mapping[Expert, ModelRef], request: Request, machine: Machine, notes: list[Note]
) -> dict[Expert, ModelRef]:
    """Return the recipes of the experts, their fp8 matrices multiplied as they are where that can be and is wanted.

    Raises MachineError or RequestError where it is asked for and cannot be.
    """
    able = {expert for expert, ref in refs.items() if ref.dtype == "bfloat16" and any(_multiplied(ref))}
    asked_not_to = [ref.files[0].name for ref in refs.values() if "weight only" in ref.quantisation]
    if request.fp8_matmul and not machine.fp8_matmul:
        raise MachineError(
            f"fp8_matmul: {machine.name or machine.device} does not multiply fp8 numbers; NVIDIA cards from the RTX 40 "
            "series and H100 on do",
            "leave --fp8-matmul out: fp8 weights are then unpacked to be multiplied",
            need="fp8 multiplication",
            have=machine.device,
        )
    if request.fp8_matmul and not able:
        held = ", ".join(ref.quantisation or ref.dtype for ref in refs.values())
        raise RequestError(
            f"fp8_matmul: the DiT holds no fp8 e4m3 matrices with a scale for each row or tensor, but {held}",
            "leave --fp8-matmul out; `kinema convert --to fp8_channel` makes a file without that mark"
            if asked_not_to
            else "pass --quantise fp8 as well, or leave --fp8-matmul out",
            field="fp8_matmul",
            got=True,
        )
    if not machine.fp8_matmul or request.fp8_matmul is False:
        return dict(refs)
    if asked_not_to:
        text = f"{asked_not_to[0]} says which of its fp8 matrices are to be unpacked; those are not multiplied in fp8"
        notes.append(Note(about="fp8_matmul", text=text))
    if not able:
        return dict(refs)
    if request.fp8_matmul is None:
        text = "fp8 matrices are multiplied as they are, activations rounded to fp8; --fp8-matmul no unpacks them"
        notes.append(Note(about="fp8_matmul", text=text))
    return {
        expert: ref.model_copy(update={"fp8_matmul": True}) if expert in able else ref for expert, ref in refs.items()
    }


def unpacking_bytes(ref: ModelRef, tokens: int) -> float:
    """Return what a layer over a packed matrix takes beside its input and output, the widest layer of the model.

    That is the unpacked matrix with a chunk of it in float32; or its input in fp8, for `tokens` rows, where those are
    multiplied. Source: weights.quantised.packed and layers, whose CHUNK this knows.
    """
    if not ref.quantisation:
        return 0.0
    dim, wide = ref.config["dim"], max(ref.config.get(side, 0) for side in ("ffn_dim", "mlp_dim", "dim"))
    unpacked, rounded = dim * wide * (4 if ref.dtype == "float32" else 2), tokens * max(dim, wide)
    if ref.fp8_matmul:
        unpacked = rounded if all(_multiplied(ref)) else max(unpacked, rounded)
    return float(unpacked + CHUNK_BYTES)


def _multiplied(ref: ModelRef) -> list[bool]:
    """Whether each kind of packed matrix that a recipe holds may be multiplied in fp8 as it is."""
    kinds = ref.quantisation.split(" + ")
    unlike = ("rotated", "weights", "weight only")
    return [kind == "fp8" or ("fp8_e4m3" in kind and not any(word in kind for word in unlike)) for kind in kinds]
