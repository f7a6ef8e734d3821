"""The commands of the local stack: ``breakhis up``, ``down``, ``status``, ``doctor``, ``run`` and ``demo``."""

import json
import signal
import types
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ml.core.errors import BreakhisError, Refused, StackError
from ml.core.mlflow_files import ARTIFACTS, relocate_files
from ml.core.progress import say
from ml.core.settings import read_settings
from ml.local.accounts import SERVICE_USER
from ml.local.candidate import Candidate
from ml.local.doctor import Check, check_machine
from ml.local.stack import Stack
from ml.local.workflow import Workflow, run_demo, run_workflow

Json = dict[str, Any]

# Not ml.cli's: that package imports this module, so importing from it would be a circle.
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
set_argument = click.argument("training_set", metavar="[SET]", type=click.Path(), default="demo")

_CHECK_STYLES = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "missing": "[red]missing[/]"}


@click.command()
def up() -> None:
    """Start Airflow and MLflow on this machine, and return once they are healthy."""
    stack = Stack(read_settings())
    earlier = stack.state()
    state = stack.up()
    problems = stack.check_dags(state)
    if earlier and earlier.started == state.started:
        say("Airflow and MLflow are running already.")
    _print_addresses(stack)
    if problems:
        raise StackError("Airflow and MLflow run, but not with all their DAGs:\n" + "\n".join(problems))


@click.command()
def down() -> None:
    """Stop what 'up' started. Data, runs and waiting reviews are kept."""
    say("Airflow and MLflow are stopped." if Stack(read_settings()).down() else "Nothing was running.")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Say what runs, whether it is healthy, and where. Exit status 3 if Airflow lacks a pool that tasks wait for."""
    shown = Stack(read_settings()).status()
    if as_json:
        click.echo(json.dumps(shown, sort_keys=True))
    elif not shown["services"]:
        click.echo("Nothing is running. Start Airflow and MLflow with: breakhis up")
    else:
        _print_status(shown)
    if shown["pools"]:
        raise StackError(shown["pools"])


def _print_status(shown: Json) -> None:
    table = Table("server", "state", "address", "pid", "log")
    for name, service in shown["services"].items():
        state = "healthy" if service["healthy"] else service["trouble"]
        table.add_row(name, escape(state), service["url"], str(service["pid"]), service["log"])
    _print_tables(table)
    for hint in shown["hints"]:
        click.echo(f"Note: {hint}")
    click.echo(f"Users of both: {', '.join(user for user in shown['users'] if user != SERVICE_USER)}")
    click.echo(f"Their passwords: {shown['passwords']}")
    click.echo(f"Store: {shown['store']}")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine: what is there, what is missing, and what to do. Exit status 3 if something required is."""
    checks = check_machine(read_settings())
    missing = [check.name for check in checks if check.state == "missing"]
    if as_json:
        click.echo(json.dumps({"ok": not missing, "checks": [check.as_json() for check in checks]}, sort_keys=True))
    else:
        _print_checks(checks)
    if missing:
        raise BreakhisError(f"this machine lacks what is required: {', '.join(missing)}")


@click.command()
def relocate() -> None:
    """Make MLflow find its files after BREAKHIS_HOME was moved or copied. Stop what runs first: breakhis down."""
    settings = read_settings()
    if Stack(settings).state():
        raise StackError("Airflow and MLflow run; stop them first with: breakhis down")
    corrected = relocate_files(settings.home)
    for folder, places in corrected.items():
        say(f"MLflow named {folder} in {places:,} places; now it names {settings.home / ARTIFACTS}.")
    if not corrected:
        say(f"MLflow names the files of {settings.home} already.")


@click.command()
@set_argument
def run(training_set: str) -> None:
    """Start Airflow and MLflow, ingest and train SET (a name or a .yaml path; default: demo), up to the reviews.

    Everything stays up: a reviewer then approves or rejects in Airflow. Exit status 4 if a gate blocked a model.
    """
    _print_outcome(run_workflow(training_set, read_settings()))


@click.command()
@set_argument
@json_option
def demo(training_set: str, as_json: bool) -> None:
    """Run the whole workflow without a person, then stop. Exit status 0 only if both models have an approved champion.

    The first reviewer's account approves over Airflow's API, with a reason that says that a script did so.
    """

    def report(workflow: Workflow, summary: Json) -> None:
        if workflow.candidates:
            _print_summary(workflow, summary, to_stderr=as_json)
        say(f"{summary['seconds']:.0f} s in all; Airflow and MLflow are stopped.")
        if as_json:
            click.echo(json.dumps(summary, sort_keys=True))

    def interrupt(number: int, frame: types.FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    # A kill or a time limit has to stop the servers, as Ctrl-C does.
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        run_demo(training_set, read_settings(), report)
    finally:
        signal.signal(signal.SIGTERM, handler)


commands: list[click.Command] = [up, down, status, doctor, relocate, run, demo]

# --- output for people ------------------------------------------------------------------------------------------------


def _print_tables(*tables: Table, to_stderr: bool = False) -> None:
    """Prints tables, 200 characters wide where no terminal limits them."""
    output = Console(stderr=to_stderr)
    if not output.is_terminal:
        output.width = 200
    for table in tables:
        output.print(table)


def _print_addresses(stack: Stack) -> None:
    shown = stack.status()
    for name, service in shown["services"].items():
        click.echo(f"{name:<8} {service['url']}")
    users = ", ".join(user for user in shown["users"] if user != SERVICE_USER)
    click.echo(f"users    {users}; passwords: {shown['passwords']}")


def _print_checks(checks: list[Check]) -> None:
    table = Table("check", "", "found", "what to do")
    for check in checks:
        table.add_row(check.name, _CHECK_STYLES[check.state], escape(check.found), escape(check.advice))
    _print_tables(table)


def _print_outcome(workflow: Workflow) -> None:
    stack, passwords = workflow.stack, workflow.stack.passwords()
    reviewer = stack.settings.reviewers[0]
    click.echo()
    click.echo(f"{workflow.training_set.name}: the workflow ran in {workflow.summary()['seconds']:.0f} s.")
    click.echo()
    for candidate in workflow.candidates:
        click.echo(f"{candidate.model} version {candidate.version}: {_describe_outcome(candidate)}")
        if candidate.is_waiting:
            click.echo(f"  review         {workflow.review_url(candidate)}")
        click.echo(f"  promotion      {workflow.run_url(candidate.promote)}")
        click.echo(f"  model version  {workflow.version_url(candidate)}")
        click.echo(f"  MLflow run     {workflow.training_url(candidate)}")
    click.echo()
    click.echo(f"Airflow  {workflow.airflow}")
    click.echo(f"  the retraining   {workflow.run_url(workflow.retrain)}")
    click.echo(f"  waiting reviews  {workflow.airflow}/required_actions")
    click.echo(f"MLflow   {workflow.mlflow}")
    click.echo()
    click.echo("Log in to either as (in MLflow all but admin only look):")
    for user, role in stack.users().items():
        if user != SERVICE_USER:
            click.echo(f"  {user:<10} {passwords[user]}   {_USER_PURPOSES.get(user, f'role {role}')}")
    click.echo()
    if any(candidate.is_waiting for candidate in workflow.candidates):
        click.echo(f"Next: log in as {reviewer}, open a review above, read the evidence, and approve or reject with a")
        click.echo("reason. An approved version becomes the champion. Stop everything with: make down")
    else:
        click.echo("Nothing waits for a review. Stop everything with: make down")
    blocked = [candidate.model for candidate in workflow.candidates if candidate.passed is False]
    if blocked:
        raise Refused(f"blocked by the gates: {', '.join(blocked)}; the promotion's page above says by which")


_USER_PURPOSES = {
    "engineer": "starts and watches retrainings",
    "reviewer": "answers reviews",
    "admin": "may do everything but answer a review",
    "viewer": "only looks",
}


def _describe_outcome(candidate: Candidate) -> str:
    if candidate.is_waiting:
        return "passed its gates and waits for review"
    if candidate.passed is False:
        return f"blocked by its gates: {candidate.failing}"
    if candidate.champion == candidate.version:
        return f"is the champion; {candidate.reviewer} approved it"
    if candidate.decision:
        return f"{candidate.reviewer} answered {candidate.decision}: {candidate.reason}"
    return f"its promotion is {candidate.promote.state}"


def _print_summary(workflow: Workflow, summary: Json, *, to_stderr: bool) -> None:
    sides = Table("", "images", "cases", title=f"{summary['set']}: images and cases on each side of the split")
    for side in ("train", "validation", "test"):
        counts = summary["split"].get(side) or {}
        sides.add_row(side, str(counts.get("images", "")), str(counts.get("cases", "")))
    models = Table("", *(f"{candidate.model} v{candidate.version}" for candidate in workflow.candidates))
    metrics = {name for c in workflow.candidates for name, value in c.metrics.items() if isinstance(value, int | float)}
    for name in sorted(metrics):
        values = [candidate.metrics.get(name) for candidate in workflow.candidates]
        models.add_row(name, *("" if value is None else _format_number(value) for value in values))
    models.add_section()
    models.add_row("gates", *(_format_gates(candidate) for candidate in workflow.candidates))
    models.add_section()
    models.add_row("decision", *(escape(candidate.decision) for candidate in workflow.candidates))
    models.add_row("reviewer", *(escape(candidate.reviewer) for candidate in workflow.candidates))
    models.add_row("champion", *(f"version {c.champion}" if c.champion else "none" for c in workflow.candidates))
    _print_tables(sides, models, to_stderr=to_stderr)  # with --json, stdout has nothing but the JSON
    features = summary["features"]
    if features:
        say(f"Features: {features.get('extracted')} images extracted, {features.get('cached')} taken from the cache.")


def _format_gates(candidate: Candidate) -> str:
    lines = []
    for gate in candidate.gates:
        sign = "[green]✔[/]" if gate["passed"] else "[red]✘[/]"
        value, limit = _format_number(gate["value"]), _format_number(gate["limit"])
        figures = "" if gate["limit"] is None else f" {value} (at least {limit})"
        lines.append(f"{sign} {escape(gate['name'])}{figures}")
    return "\n".join(lines)


def _format_number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
