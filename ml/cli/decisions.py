"""``breakhis history`` and ``breakhis audit``: who decided what, and whether the record of it is whole."""

import time

import click

from ml.cli.options import Outcome, deliver, json_option, stage
from ml.settings import Settings, settings
from ml.store import Json, Store

_SECONDS = 2.0


@click.command()
@click.argument("model")
@json_option
def history(model: str, as_json: bool) -> None:
    """Show who decided what about MODEL's versions, when, why, and on which evidence."""
    from ml.audit import CARRIED_OUT, AuditLog

    own = settings()
    records = [one for one in AuditLog(Store(own.store), own).of(model) if one["event"] != CARRIED_OUT]
    deliver({"model": model, "decisions": records}, as_json, None, _show_history)


def _show_history(result: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    if not result["decisions"]:
        click.echo(f"nothing was ever decided about {result['model']}")
        return
    table = Table("when (UTC)", "version", "decision", "by", "why", "champion before", "evidence")
    for record in result["decisions"]:
        before = record.get("champion")
        table.add_row(
            record["at"][:19].replace("T", " "),
            str(record["version"]),
            record["event"],
            record["by"],
            record["reason"],
            "" if before is None else str(before),
            record.get("bundle") or record.get("evidence") or "",
        )
    Console(width=max(Console().width, 140)).print(table)


@click.group()
def audit() -> None:
    """Check the audit log of promotions."""


def verify(store: Store, own: Settings) -> Json:
    """Check that the audit log is whole, and that the champions are those it names. Exit status 4 if not.

    Finds records that were edited, deleted, reordered, replaced or cut off, and aliases moved behind the log's back.
    """
    from ml.audit import CARRIED_OUT, AuditLog
    from ml.promotion import check_aliases
    from ml.registry import anchors

    log = AuditLog(store, own)
    if faults := log.verify(known := anchors(own)):
        time.sleep(_SECONDS)  # a decision that was carried out between the two readings looks like a fault
        faults = log.verify(known := anchors(own))
    records: list[Json] = []
    if not faults:
        records = log.records()
        models = sorted({record["model"] for record in records})
        faults = [moved for model in models if (moved := check_aliases(model, log, own))]
    decisions = [record for record in records if record["event"] != CARRIED_OUT]
    result: Json = {
        "passed": not faults,
        "records": len(records),
        "decisions": len(decisions),
        "models": sorted(known),
        "faults": faults,
    }
    if faults:
        raise Outcome(result, "; ".join(faults))
    return result


audit.add_command(stage(verify))

DECISIONS = [history, audit]
