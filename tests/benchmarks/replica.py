"""Pictures of 700x460 under BreakHis' names, drawn once and kept, for whoever measures with many."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ml.progress import track
from ml.sources.demo import DRAWING_VERSION, LARGEST, pictures

__all__ = ["LARGEST", "Replica"]

SEED = 1


class Replica(NamedTuple):
    """A folder with pictures in the original tree of BreakHis. Slide 14-13412 is there twice, with the same pixels."""

    folder: Path
    images: int

    @classmethod
    def drawn(cls, images: int, cache: Path) -> "Replica":
        """Draw it, or take the one that lies in ``cache`` (4.4 GB for all of BreakHis)."""
        folder = cache / f"replica-{images}-{SEED}-{DRAWING_VERSION}"
        if not folder.exists():
            scratch = folder.with_suffix(".drawing")
            shutil.rmtree(scratch, ignore_errors=True)
            workers = len(os.sched_getaffinity(0))
            for path, data in track(pictures(images, SEED, workers), total=images, what="drawing the replica"):
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                (scratch / path).write_bytes(data)
            scratch.rename(folder)
        return cls(folder, images)
