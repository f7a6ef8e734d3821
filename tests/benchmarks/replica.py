"""Pictures of 700x460 under BreakHis' names, drawn once and kept, for whoever measures with many."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ml.core.progress import track
from ml.data.sources.demo import DRAWING_VERSION, MAX_PICTURES, draw_files

__all__ = [
    "MAX_PICTURES",
    "Replica",
]

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
            for path, data in track(draw_files(images, SEED, workers), total=images, what="drawing the replica"):
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                (scratch / path).write_bytes(data)
            scratch.rename(folder)
        return cls(folder, images)

    @contextmanager
    def home(self, workers: int, **settings: str) -> Iterator[tuple[Path, dict[str, str]]]:
        """A home folder beside the replica, so that its disk is the one that is measured, and an environment for it."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.folder.parent) as folder:
            home = Path(folder)
            (home / "sources").mkdir()
            yaml = f"name: replica\nkind: directory\npath: {self.folder}\n"
            (home / "sources" / "replica.yaml").write_text(yaml)
            (home / "training_sets").mkdir()
            yaml = "name: replica\nsources: [replica]\nledger: replica\npolicy: none\npreset: default\n"
            (home / "training_sets" / "replica.yaml").write_text(yaml)
            inherited = {name: value for name, value in os.environ.items() if not name.startswith("BREAKHIS_")}
            own = {"BREAKHIS_HOME": str(home), "BREAKHIS_CONF": str(home), "BREAKHIS_WORKERS": str(workers)}
            yield home, {**inherited, **own, **{f"BREAKHIS_{name}": value for name, value in settings.items()}}
