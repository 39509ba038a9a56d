"""What this machine has, what a stage really took of it, and how fast it proved to be.

Owns devices, memory and the calibration file, whose path the caller gives. Touches CUDA only when called.
Knows nothing of models or plans.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

from kinema.errors import MachineError, OutputError, RequestError
from kinema.schema import Machine, calibration_key
from kinema.weights.writing import whole_file

CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets VmHWM to what is resident now
SAMPLE_SECONDS = 0.01
LARGE_BLOCK = 2**20
MEMORY_RAN_OUT = re.compile(r"can't allocate memory|out of memory|not enough memory|ALLOC_FAILED")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


# --- what there is -------------------------------------------------------------------------------


def probe_machine(device: str | None = None, calibration: Path | None = None) -> Machine:
    """Return the facts of `device` and of the machine around it.

    device       cpu, cuda, cuda:1 or mps; None takes the best present: cuda, then mps, then cpu.
    calibration  file that `record_calibration` wrote; may be missing.

    memory_* are those of the device, ram_* of the host, both bytes, within the limits of a container.
    `bfloat16` says whether the device multiplies bfloat16 in hardware, not whether torch can.
    Raises RequestError for a device of another name, MachineError for one that is not here.
    """
    chosen = torch.device(_present(device))
    name, bfloat16 = _name_and_bfloat16(chosen)
    total, free = memory(str(chosen))
    ram_total, ram_free = memory("cpu")
    return Machine(
        device=str(chosen),
        name=name,
        memory_total=total,
        memory_free=free,
        ram_total=ram_total,
        ram_free=ram_free,
        cores=num_cores(),
        bfloat16=bfloat16,
        fp8_matmul=_multiplies_fp8(chosen),
        calibration=read_calibration(calibration, str(chosen)) if calibration else {},
    )


def memory(device: str) -> tuple[int, int]:
    """Return (total, free) bytes of a device."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        # What torch's own cache holds and does not use is free to us.
        return total, free + torch.cuda.memory_reserved(chosen) - torch.cuda.memory_allocated(chosen)
    if chosen.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total, max(total - torch.mps.driver_allocated_memory(), 0)
    ram = psutil.virtual_memory()
    limit, used = _container_memory()
    return min(ram.total, limit), max(min(ram.available, limit - used), 0)


def num_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _present(device: str | None) -> str:
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if device is None:
        return "cuda" if num_cuda else "mps" if has_mps else "cpu"
    if not (match := re.fullmatch(r"cpu|mps|cuda(?::(\d+))?", device)):
        raise RequestError(
            f"device {device!r} is not cpu, cuda, cuda:N or mps",
            "leave --device out to take the best present",
            field="device",
            got=device,
            allowed=["cpu", "cuda", "cuda:N", "mps"],
        )
    here = ["cpu", *(f"cuda:{index}" for index in range(num_cuda)), *(["mps"] if has_mps else [])]
    wanted = "cuda:0" if device == "cuda" else f"cuda:{int(match[1])}" if match[1] else device
    if wanted not in here:
        why = ""
        if wanted.startswith("cuda") and not torch.backends.cuda.is_built():
            why = f"; torch {torch.__version__} is built without CUDA"
        raise MachineError(
            f"device {device} is not here, only {', '.join(here)}{why}",
            f"pass --device {here[-1]}, or none",
            need=device,
            have=here,
        )
    return device


def _name_and_bfloat16(device: torch.device) -> tuple[str, bool]:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return f"{platform.machine()} GPU", int((platform.mac_ver()[0] or "0").split(".")[0]) >= 14
    name, flags = platform.processor() or platform.machine(), set[str]()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
            name = found[1].strip()
        if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
            flags = set(found[1].split())
    return name, bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def _multiplies_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies fp8 with a scale a row, found by doing it: cards and versions of torch differ."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    try:
        ones = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
        scale = torch.full((32, 1), 0.5, device=device)
        product = torch._scaled_mm(ones, ones.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        return bool((product == 8).all())
    except RuntimeError:
        return False


def _container_memory() -> tuple[float, float]:
    """Return (limit, used) bytes of the control group, used without its droppable file cache; (inf, 0) without one."""
    places = [  # version 2, then 1
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    for folder, limit_name, used_name, droppable in places:
        with suppress(OSError, ValueError):
            limit = float((folder / limit_name).read_text())  # "max" where there is none
            used = float((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return limit, used - float(stat.get(droppable, 0))
    return math.inf, 0.0


def keep_large_blocks_apart() -> None:
    """Have the C library give large tensors pages of their own, which go back to the system when they are freed.

    By default glibc learns from the first ones to put up to 32 MB among the small ones, whose holes then stay: a run
    of a small model took up to twice its tensors. Nothing happens with other libraries.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK)


@contextmanager
def keep_within(device: str, limit: int) -> Iterator[None]:
    """Have tensors on a GPU take no more than `limit` bytes within the block: more is out of memory, however large the
    card. 0, or another device, which torch cannot be held to: no limit.
    """
    capped = torch.device(device)
    if capped.type != "cuda" or not limit:
        yield
        return
    index = torch.cuda.current_device() if capped.index is None else capped.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()  # what is reserved counts, used or not
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory ran out, on any device."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and MEMORY_RAN_OUT.search(str(error)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # of mapping a file
            return True
        error = error.__cause__
    return False


# --- what a stage took ---------------------------------------------------------------------------


class PeakMemory:
    """Context manager: `bytes` is the peak of a stage, resident memory on a CPU, allocated memory on a GPU.

    The peak includes what was held when the stage began. May be nested; the outer peak covers the inner.
    On Linux and CUDA the peak is exact; elsewhere it is sampled every 10 ms.
    """

    _open: list[PeakMemory] = []  # noqa: RUF012  open ones share the counters they reset
    _lock = threading.RLock()

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> PeakMemory:
        with self._lock:
            for other in self._open:
                other._note()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            elif self.device.type == "mps" or not _reset_high_water_mark():
                self._sampler = _Sampler(self.device)
            self._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for other in self._open:
                other._note()
            self._open.remove(self)
        if self._sampler:
            self._sampler.stop()
            self.bytes = max(self.bytes, self._sampler.peak)

    def _note(self) -> None:
        if self.device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self.device))
        elif self._sampler is None:
            self.bytes = max(self.bytes, _high_water_mark() or 0)


class _Sampler:
    """Reads the memory in use every few milliseconds, from a thread."""

    def __init__(self, device: torch.device) -> None:
        self._read = torch.mps.driver_allocated_memory if device.type == "mps" else _resident
        self._done = threading.Event()
        self.peak = self._read()
        self._thread = threading.Thread(target=self._run, name="kinema-peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._read())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _reset_high_water_mark() -> bool:
    """Set VmHWM back to what is resident now; False where the system has no such thing."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    # Some kernels take the write and ignore it.
    peak = _high_water_mark()
    return peak is not None and peak <= _resident() * 1.05 + 2**24


def _high_water_mark() -> int | None:
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M):
            return int(found[1]) * 1024
    return None


# --- how fast it proved to be --------------------------------------------------------------------


def read_calibration(path: Path, device: str) -> dict[str, float]:
    """Return work per second by stage and decade of work, {} where the file is missing or unreadable.

    Keys are those of `calibration_key`. A lost calibration costs a prediction, nothing else.
    """
    try:
        rates = json.loads(path.read_text())[device]
        return {str(key): float(rate) for key, rate in rates.items() if float(rate) > 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def record_calibration(path: Path, device: str, work: Mapping[str, float], seconds: Mapping[str, float]) -> None:
    """Keep what each stage managed, work[stage] / seconds[stage], beside what is known of other sizes and devices.

    Half the new rate and half the old where both exist. A file that cannot be written costs a later
    prediction, so that is no error; the folder is made if it is missing.
    """
    known = read_calibration(path, device)
    for stage in work.keys() & seconds.keys():
        if work[stage] > 0 and seconds[stage] > 0:
            key, rate = calibration_key(stage, work[stage]), work[stage] / seconds[stage]
            known[key] = (known.get(key, rate) + rate) / 2
    with suppress(OutputError), whole_file(path) as temporary:
        try:
            whole = json.loads(path.read_text())
        except (OSError, ValueError):
            whole = {}
        whole = whole if isinstance(whole, dict) else {}
        temporary.write_text(json.dumps(whole | {device: known}, indent=1))
