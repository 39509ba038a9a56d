"""Finished clips on disk beside the output until the video is whole, so that a long job goes on where it stopped.

One small latents file a clip, each carrying the plan: any of them says what the job was. Of the clip that is being
sampled, the last saved step.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from kinema import ops
from kinema.errors import CheckpointError, OutputError
from kinema.kept_steps import STEPS_SUFFIX, KeptSteps, refuse_changed, stamps
from kinema.media.files import write_whole
from kinema.schema import Plan
from kinema.weights.files import open_tensors

CLIPS_SUFFIX = ".clips"
FILES_KEY = "kinema_files"
NAME = re.compile(r"clip_(\d+)\.safetensors")


class KeptClips:
    """Latents of the clips that are done, in order.

    folder   where each new one is written; made when the first one is. None: all clips are there, and are not ours.
    """

    def __init__(self, plan: Plan, folder: Path | None, latents: list[Tensor] | None = None) -> None:
        self.plan, self.folder, self.latents = plan, folder, latents or []

    @classmethod
    def open(cls, folder: Path, to_go_on: bool = False) -> KeptClips:
        """Return what a folder holds.

        to_go_on   more will be made: then steps of the first clip are enough, and every file must be the one it was.

        Raises CheckpointError for a folder that is not of this kind, or has a gap, and where a file has changed.
        """
        found = folder.iterdir() if folder.is_dir() else ()
        numbers = sorted(int(match[1]) for path in found if (match := NAME.fullmatch(path.name)))
        begun = folder / _name(1, STEPS_SUFFIX)
        if to_go_on and not numbers and begun.exists():
            return cls(KeptSteps.open(begun).plan, folder)
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            holds = f"clips {', '.join(map(str, numbers))}" if numbers else "no clips"
            wrong = f"holds {holds}; finished clips are numbered from 1 on, without a gap"
            raise CheckpointError(
                f"{folder} {wrong if folder.is_dir() else 'is no folder of finished clips'}",
                f"name a folder NAME{CLIPS_SUFFIX} that Kinema left beside an output",
                path=str(folder),
            )
        read = [ops.read_latents(folder / _name(number)) for number in numbers]
        plan = read[0][1]
        if to_go_on:
            metadata = open_tensors(folder / _name(1)).metadata
            refuse_changed(plan, json.loads(metadata.get(FILES_KEY, "{}")))
        return cls(plan, folder, [latents for latents, _ in read])

    def __len__(self) -> int:
        return len(self.latents)

    def steps(self) -> KeptSteps:
        """Return the sampling of the next clip, behind the steps that are saved of it."""
        assert self.folder is not None, "what is sampled is kept"
        path = self.folder / _name(len(self) + 1, STEPS_SUFFIX)
        return KeptSteps.open(path) if path.exists() else KeptSteps(self.plan, 0, path)

    def add(self, latents_CFhw: Tensor) -> None:
        """Keep one more clip. Where the folder cannot be written to, a temporary one takes its place."""
        assert self.folder is not None, "what is sampled is kept"
        self.latents.append(latents_CFhw)
        try:
            self._write(self.folder, len(self))
            (self.folder / _name(len(self), STEPS_SUFFIX)).unlink(missing_ok=True)
        except OutputError:
            moved = Path(tempfile.mkdtemp(prefix="kinema-", suffix=CLIPS_SUFFIX))
            for number in range(1, len(self) + 1):
                self._write(moved, number)
            self.folder = moved

    def _write(self, folder: Path, number: int) -> None:
        files = {FILES_KEY: json.dumps(stamps(self.plan))}
        write_whole(folder / _name(number), ops.latents_bytes(self.latents[number - 1], self.plan, files))

    def remove(self) -> None:
        """Drop the files: the video is whole."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)

    def hint(self) -> str:
        """What to type so that nothing is lost; "" where nothing is kept."""
        if self.folder is None or not self.folder.is_dir():
            return ""
        done = f"{len(self)} of {len(self.plan.clips)} clips are finished, in {self.folder}"
        alone = f"\nmake a video of these alone with: kinema decode {self.folder}" if self.latents else ""
        return f"{done}; go on with: kinema resume {self.folder}{alone}"


def _name(number: int, suffix: str = ".safetensors") -> str:
    return f"clip_{number:04}{suffix}"
