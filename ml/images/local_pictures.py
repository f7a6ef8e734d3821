"""Reads local pictures that somebody wants classified, under the limits that new pictures have in an ingestion."""

from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

from ml.core.errors import ImageError
from ml.core.workers import Death, map_one_by_one
from ml.images.deep_pictures import read_scaled
from ml.images.file_facts import explain_death


def read_pictures(
    files: Iterable[Path], significant_bits: int | None, memory: int, cpu_seconds: float
) -> Generator[tuple[Path, bytes | ImageError], None, None]:
    """Yields each file with its content in 8 bits a channel, or with the reason why that cannot be read.

    They are decoded in a process of its own, which a crash or the kernel may end; each when it is asked for.

    Args:
        files: the pictures' files.
        significant_bits: bits that deeper pictures fill, which are scaled to 8; None refuses such pictures.
        memory: bytes that decoding a picture may take.
        cpu_seconds: CPU time that reading a picture may take.
    """
    jobs = (_ReadingJob(file, significant_bits, memory, cpu_seconds) for file in files)
    yield from map_one_by_one(_read, jobs, _describe_death, cpu_seconds)


class _ReadingJob(NamedTuple):
    """A local file, and how it may be decoded."""

    file: Path
    significant_bits: int | None
    memory: int
    cpu_seconds: float


def _read(job: _ReadingJob) -> tuple[Path, bytes | ImageError]:
    try:
        return job.file, read_scaled(job.file, job.significant_bits, job.memory)
    except ImageError as error:
        return job.file, error


def _describe_death(job: _ReadingJob, why: Death) -> tuple[Path, bytes | ImageError]:
    return job.file, ImageError(why, f"{job.file}: {explain_death(why, job.cpu_seconds)}")
