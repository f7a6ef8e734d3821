"""The ``breakhis`` command, with a sub-command for each stage and those of the local stack."""

import os
import signal
import sys
import traceback

import click

from ml.cli.decisions import DECISIONS
from ml.cli.sources import sources
from ml.cli.stages import STAGES
from ml.cli.tools import TOOLS
from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError
from ml.core.messages import MAX_FAULT, cut_message, show_controls
from ml.core.parameters import refuse_empty_texts
from ml.core.progress import say
from ml.core.shortages import explain_shortage
from ml.local.cli import commands as local_commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="breakhis")
def cli() -> None:
    """Retrain breast-histopathology classifiers: ingest, validate, train, gate and promote.

    Every stage reads its input by name or id from the store, writes its output there and prints one JSON object with
    --json. Exit status: 0 done, 2 wrong usage, 3 bad input, 4 refused (validation, gates, promotion), 75 try again,
    1 a fault of breakhis itself.
    """


for command in [*STAGES, *DECISIONS, sources, *TOOLS, *local_commands]:
    cli.add_command(command)
refuse_empty_texts(cli)


def main() -> None:
    """Runs the command line. A BreakhisError is printed as one line and sets the exit status; a fault ends with 1."""
    # A scheduler stops a stage by SIGTERM. An ordinary exit then closes MLflow runs and removes scratch files.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        cli(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        # The parser quotes whole arguments, and puts more around this when it is shown.
        error.message = show_controls(cut_message(error.message, MAX_FAULT))  # type: ignore[misc]
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        print("error: stopped by the user", file=sys.stderr)
        sys.exit(130)
    except BreakhisError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        if cause := explain_os_error(error) or explain_shortage(error) or _find_outage(error):
            say(f"error: {cause}")
            _drop_unwritten_output()
            sys.exit(cause.exit_code)
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error} (a fault of breakhis; see the traceback above)", file=sys.stderr)
        sys.exit(1)


def _drop_unwritten_output() -> None:
    """Drops what could not be written to stdout, such as to a full disk: Python would fail once more at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _find_outage(error: Exception) -> BreakhisError | None:
    """Returns our error where MLflow or S3 was out of reach; each is imported only if it raised the error."""
    raised_by = type(error).__module__.partition(".")[0]
    if raised_by in {"mlflow", "sqlalchemy", "google"}:  # the last reads MLflow's answers
        from ml.core import mlflow_client

        return mlflow_client.find_outage(error)
    if raised_by in {"botocore", "urllib3"}:
        from ml.core import s3_access

        return s3_access.find_outage(error)
    return None
