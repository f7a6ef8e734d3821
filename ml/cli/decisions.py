"""``breakhis history`` and ``breakhis audit``: who decided what, and whether the record of it is whole."""

import time

import click

from ml.cli.options import RefusedResult, json_option, output_result, stage_command
from ml.core.messages import cut_text
from ml.core.names import suggest_name
from ml.core.settings import Settings, read_settings
from ml.core.store import Json, Store
from ml.data.training_sets import registered_model_names

_SECONDS_TO_RETRY = 2.0


@click.command()
@click.argument("model")
@json_option
def history(model: str, as_json: bool) -> None:
    """Show who decided what about MODEL's versions, when, why, and on which evidence."""
    from ml.promotion.audit_log import AuditLog, read_decisions

    settings = read_settings()
    store = Store(settings.store)
    records = read_decisions(store, model, AuditLog(store, settings))[::-1]
    output_result({"model": model, "decisions": records}, as_json, None, _print_history)


def _print_history(result: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    if not result["decisions"]:
        from ml.promotion.audit_log import read_decisions

        decided = {record["model"] for record in read_decisions(Store(read_settings().store))}
        known = {*decided, *registered_model_names(read_settings())}
        hint = "" if result["model"] in known else suggest_name(result["model"], known)
        click.echo(f"nothing was ever decided about {cut_text(result['model'])}{hint}")
        return
    table = Table("when (UTC)", "version", "decision", "by", "why", "champion before", "evidence")
    for record in result["decisions"]:
        former_champion = record.get("champion")
        table.add_row(
            record["at"][:19].replace("T", " "),
            str(record["version"]),
            record["event"] if record["verified"] else f"{record['event']} (!)",
            record["by"],
            record["reason"],
            "" if former_champion is None else str(former_champion),
            record.get("bundle") or record.get("evidence") or "",
        )
    Console(width=max(Console().width, 140)).print(table)
    if not all(record["verified"] for record in result["decisions"]):
        click.echo("Records marked (!) were changed since they were written; see: breakhis audit verify")


@click.group()
def audit() -> None:
    """Check the audit log of promotions."""


def verify(store: Store, settings: Settings) -> Json:
    """Check that the audit log is whole, and that the champions are those it names. Exit status 4 if not.

    Finds records that were edited, deleted, reordered, replaced, cut off or not carried out, aliases that were moved
    without a record, champions that nobody approved, and changed files, metrics or evidence of a champion or of the
    champion before it.
    """
    from ml.promotion.auditing import audit_registry

    result = audit_registry(store, settings)
    if result["faults"]:
        time.sleep(_SECONDS_TO_RETRY)  # a decision carried out between reading log and registry looks like a fault
        result = audit_registry(store, settings)
    if result["faults"]:
        raise RefusedResult(result, "; ".join(result["faults"]))
    return result


audit.add_command(stage_command(verify))

DECISIONS = [history, audit]
