"""``make bench``: measures speed and memory on this machine, prints a table, and writes JSON.

Figures that are compared are measured in one run, in turns. Nothing here is asserted by the tests: a figure says how
fast this machine was, not whether the product is right.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

from ml.core.devices import processor_name
from ml.core.settings import read_settings
from tests.benchmarks import extraction, gpu, ingestion, training, workflow
from tests.benchmarks.measure import Figure
from tests.benchmarks.replica import MAX_PICTURES, Replica

BENCHMARKS = {
    "ingestion": ingestion.figures,
    "extraction": extraction.figures,
    "training": training.figures,
    "workflow": workflow.figures,
    "gpu": gpu.figures,
}
_BY_NAME = {"gpu"}
"""What few machines can do."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--images", default=MAX_PICTURES, show_default=True, help="Pictures of 700x460 to measure with.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=Path("bench.json"), show_default=True)
def main(names: tuple[str, ...], images: int, file: Path) -> None:
    """Measure NAMES (default: all but gpu) on pictures drawn for it, which are kept in the home folder's cache."""
    replica = Replica.drawn(images, read_settings().cache / "bench")
    found: list[Figure] = []
    for name in names or [name for name in BENCHMARKS if name not in _BY_NAME]:
        found += BENCHMARKS[name](replica)
    _print(found)
    machine = {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    when = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"when": when, "machine": machine, "images": images, "figures": [one._asdict() for one in found]}
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {file}", file=sys.stderr)


def _print(figures: list[Figure]) -> None:
    table = Table("what", "measured", "compared with", "ratio", "wanted", title="Benchmarks")
    for one in figures:
        verdict = "" if one.met is None else ("[green]met[/]" if one.met else "[red]not met[/]")
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        table.add_row(one.what, one.measured, one.compared, ratio, f"{one.wanted} {verdict}".strip())
    Console(width=max(Console().width, 140)).print(table)


if __name__ == "__main__":
    main()
