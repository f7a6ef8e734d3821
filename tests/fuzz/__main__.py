"""Prints how made inputs of every kind end. Exit status 1 if one of them ends in a fault."""

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins"))  # Airflow puts it there

from tests.fuzz.harness import run_kind, show_faults
from tests.fuzz.kinds import KINDS


def main() -> int:
    """Runs every kind, or those that were named, and prints a table."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=5_000, help="inputs in all, shared by the kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", help="part of a kind's name; default: all kinds")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.kind or any(part in kind.name for part in arguments.kind)]
    warnings.simplefilter("ignore")  # what libraries say of damaged files
    tallies = []
    print("| kind | inputs | accepted | refused | faults | seconds | peak memory |\n|---|---|---|---|---|---|---|")
    for kind in kinds:
        start = time.monotonic()
        tally = run_kind(kind, -(-arguments.inputs // len(kinds)), arguments.seed)
        faults = tally.inputs - tally.accepted - tally.refused
        seconds = time.monotonic() - start
        print(
            f"| {kind.name} | {tally.inputs:,} | {tally.accepted:,} | {tally.refused:,} | {faults:,} | {seconds:.0f} "
            f"| {tally.peak_mb:,} MB |",
            flush=True,
        )
        tallies.append(tally)
    for tally in tallies:
        show_faults(tally)
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
