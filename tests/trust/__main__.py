"""``make trust``: tries to get round gates and review, and tests the error rates of the comparison and the registry.

Prints a row for each attempt or simulation, with what happened. Exit status 1 if one came out as it must not.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ml.core.store import Store
from tests.trust import bypass, concurrency, simulation
from tests.trust.rows import Row


def _simulation() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="breakhis-trust-") as folder:
        yield from simulation.rows(Store(Path(folder).as_uri()))


PARTS = {"bypass": bypass.rows, "simulation": _simulation, "concurrency": concurrency.rows}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
def main(parts: tuple[str, ...]) -> None:
    """Try PARTS (default: all)."""
    wrong = 0
    for part in parts or PARTS:
        table = Table("what", "what happened", "", title=part, show_lines=True)
        for row in PARTS[part]():
            print(f"{part}: {row.what}: {row.happened}", file=sys.stderr, flush=True)
            table.add_row(escape(row.what), escape(row.happened), "[green]right[/]" if row.right else "[red]WRONG[/]")
            wrong += not row.right
        Console(width=max(Console().width, 140)).print(table)
    if wrong:
        sys.exit(f"error: {wrong} came out as they must not")


if __name__ == "__main__":
    main()
