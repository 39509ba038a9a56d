"""Finished clips on disk beside the output until the video is whole, so that a long job goes on where it stopped.

One small latents file a clip, each carrying the plan: any of them says what the job was.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from kinema import ops
from kinema.errors import CheckpointError, OutputError
from kinema.media.files import write_whole
from kinema.schema import Plan

CLIPS_SUFFIX = ".clips"
NAME = re.compile(r"clip_(\d+)\.safetensors")


class KeptClips:
    """Latents of the clips that are done, in order.

    folder   where each new one is written; made when the first one is. None: nothing is written.
    """

    def __init__(self, plan: Plan, folder: Path | None, latents: list[Tensor] | None = None) -> None:
        self.plan, self.folder, self.latents = plan, folder, latents or []

    @classmethod
    def open(cls, folder: Path) -> KeptClips:
        """Return what a folder holds. Raises CheckpointError for one that is not of this kind, or has a gap."""
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is no folder of finished clips",
                f"name a folder NAME{CLIPS_SUFFIX} that Kinema left beside an output",
                path=str(folder),
            )
        numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name)))
        if not numbers or numbers != list(range(1, len(numbers) + 1)):
            found = f"clips {', '.join(map(str, numbers))}" if numbers else "no clips"
            raise CheckpointError(
                f"{folder} holds {found}; finished clips are numbered from 1 on, without a gap",
                f"name a folder NAME{CLIPS_SUFFIX} that Kinema left beside an output",
                path=str(folder),
            )
        read = [ops.read_latents(folder / _name(number)) for number in numbers]
        return cls(read[0][1], folder, [latents for latents, _ in read])

    def __len__(self) -> int:
        return len(self.latents)

    def add(self, latents_CFhw: Tensor) -> None:
        """Keep one more clip. Where the folder cannot be written to, a temporary one takes its place."""
        self.latents.append(latents_CFhw)
        if self.folder is None:
            return
        data = ops.latents_bytes(latents_CFhw, self.plan)
        try:
            write_whole(self.folder / _name(len(self)), data)
        except OutputError:
            moved = Path(tempfile.mkdtemp(prefix="kinema-", suffix=CLIPS_SUFFIX))
            for number, latents in enumerate(self.latents, 1):
                write_whole(moved / _name(number), ops.latents_bytes(latents, self.plan))
            self.folder = moved

    def remove(self) -> None:
        """Drop the files: the video is whole."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)

    def hint(self) -> str:
        """What to type so that nothing is lost; "" where no clip is finished."""
        if self.folder is None or not self.latents:
            return ""
        return (
            f"{len(self)} of {len(self.plan.clips)} clips are finished, in {self.folder}; "
            f"go on with: kinema resume {self.folder}\n"
            f"make a video of these alone with: kinema decode {self.folder}"
        )


def _name(number: int) -> str:
    return f"clip_{number:04}.safetensors"
