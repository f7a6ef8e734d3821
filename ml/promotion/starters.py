"""Starters: the users who started the runs of DAGs that led to a model. None of them may approve it.

Airflow forgets: whoever may start runs may delete them, and start another of the same name. So the stage ``origin``
writes down who started a run while it is running, in the audit log, where neither they nor a training can change it.
``register`` copies that into the version's evidence. What is not known there stays unknown, and then nobody is entitled
to approve.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ml.core.airflow_api import AirflowApi, connect_airflow
from ml.core.errors import AirflowError, ConfigError
from ml.core.messages import cut_text
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.training_sets import TrainingSet
from ml.promotion.alias_history import STARTED
from ml.promotion.audit_log import AuditLog

Run = tuple[str, str]
"""Id of a DAG and id of its run."""

_BY_NOBODY = frozenset({"timetable", "asset", "operator"})
"""What Airflow says of a run's trigger where no user need have started it.

A backfill is not among them: a user starts it, whom Airflow does not write into the run, and it may run a scheduled run
again with a conf of the user's.
"""


class Starters(NamedTuple):
    """Who started some runs, and the runs that led to them."""

    users: dict[str, str]
    """Login name -> a run that this user started, as ``dag/run``."""
    unknown: str
    """Why it cannot be told of all runs; empty if it can."""

    def to_json(self) -> Json:
        """Returns ``{users, unknown}``, as it stands in records and evidence."""
        return {"users": dict(sorted(self.users.items())), "unknown": self.unknown}

    @classmethod
    def of_json(cls, content: Json) -> "Starters":
        """Returns what :meth:`to_json` gave."""
        return cls(dict(content["users"]), content["unknown"])


def record_starters(training_set: TrainingSet, store: Store, settings: Settings) -> Json:
    """Write down in the audit log who started the present run of a DAG (the ``origin`` stage).

    Doing it again adds a record only if Airflow says otherwise now: all records of a run count.

    Args:
        training_set: the set that the run trains; there is a record for each of its models.
        store: holds the audit log.
        settings: name the run, and say where Airflow is.

    Returns:
        ``{set, run, users, unknown}``; see :class:`Starters`.

    Raises:
        ConfigError: this is no task of a DAG, or Airflow's address, the service account or the audit log's key is not
            set.
        Refused: the audit log was changed.
    """
    if not (settings.dag and settings.dag_run):
        raise ConfigError("origin writes down who started a run of a DAG; it runs as a task of one, not by hand")
    api, log = connect_airflow(settings), AuditLog(store, settings)
    run = (settings.dag, settings.dag_run)
    found = trace_starters([run], api)
    for model in training_set.models.values():
        earlier = find_starters(run, log.read_model_records(model))
        if earlier is None or not found.users.keys() <= earlier.users.keys() or (found.unknown and not earlier.unknown):
            log.append(STARTED, model, run=_format_run(run), **found.to_json())
    say(f"{_format_run(run)} was started by {', '.join(sorted(found.users)) or found.unknown or 'no person'}")
    return {"set": training_set.name, "run": _format_run(run), **found.to_json()}


def find_starters(run: Run, records: Iterable[Json]) -> Starters | None:
    """Returns who started a run by the audit log, or None if it says nothing.

    A run that was deleted and started again under its name has several records, of which all count.
    """
    found = [
        Starters.of_json(record)
        for record in records
        if record["event"] == STARTED and record["run"] == _format_run(run)
    ]
    return _unite(found) if found else None


def find_training_starters(training_runs: Sequence[Sequence[str]], records: Sequence[Json] | None) -> Starters:
    """Returns who started the trainings of a version, by the audit log alone.

    Args:
        training_runs: DAG and run of each training, as the MLflow run is tagged.
        records: audit records of the model; None if they cannot be read here.
    """
    if not training_runs:
        return Starters({}, "its MLflow run does not say which run of a DAG trained it")
    if records is None:
        return Starters({}, "it was registered without the audit log's key")
    found = []
    for dag, run in training_runs:
        known = find_starters((dag, run), records)
        reason = f"the audit log does not say who started run {run} of the DAG {dag} (its task origin did not run)"
        found.append(known or Starters({}, reason))
    return _unite(found)


def trace_starters(runs: Iterable[Run], api: AirflowApi, records: Sequence[Json] = ()) -> Starters:
    """Returns who started runs and the runs that led to them: those that made their data, or triggered them.

    Args:
        runs: the runs.
        api: Airflow, which is asked about runs of which the records say nothing.
        records: audit records of the model.
    """
    to_check, checked, found = list(runs), set[Run](), list[Starters]()
    while to_check:
        run = to_check.pop()
        if run in checked:
            continue
        checked.add(run)
        if recorded := find_starters(run, records):
            found.append(recorded)
            continue
        starters, led_to_it = _ask_airflow(run, api)
        found.append(starters)
        to_check += led_to_it
    return _unite(found)


def parse_origin(conf: Json | None) -> list[Run]:
    """Returns DAG and run that a run was triggered by, as its conf says; empty where the conf names none."""
    origin = (conf or {}).get("origin")
    return [(str(origin.get("dag")), str(origin.get("run")))] if isinstance(origin, dict) else []


def _ask_airflow(run: Run, api: AirflowApi) -> tuple[Starters, list[Run]]:
    """Returns who started a run by Airflow's record, and the runs that led to it."""
    name = f"run {cut_text(run[1])} of the DAG {cut_text(run[0])}"
    try:
        record = api.dag_run(*run)
        events = api.upstream_events(*run) if record.get("run_type") == "asset_triggered" else []
    except AirflowError as error:
        if error.status != 404:
            raise
        return Starters({}, f"Airflow has {name} no more"), []
    user = record.get("triggering_user_name")
    unknown = ""
    if not user and record.get("triggered_by") not in _BY_NOBODY:
        unknown = f"Airflow does not say who started {name}"
    if any(not event.get("source_run_id") for event in events):
        unknown = f"{name} was begun by an asset event that no run made"
    led_to_it = [(str(event["source_dag_id"]), str(event["source_run_id"])) for event in events]
    starters = Starters({user: _format_run(run)} if user else {}, unknown)
    return starters, [] if unknown else [*led_to_it, *parse_origin(record.get("conf"))]


def _unite(found: Sequence[Starters]) -> Starters:
    users = {user: run for starters in found for user, run in starters.users.items()}
    return Starters(users, "; ".join(dict.fromkeys(starters.unknown for starters in found if starters.unknown)))


def _format_run(run: Run) -> str:
    return "/".join(run)
