"""Builds DAGs of YAML files, one DAG a file, so that a file that cannot be used affects none of the others.

Such a file has a DAG all the same, which is tagged ``invalid`` and says what is wrong. An import error instead would be
reported for the DAG file that reads all YAML files, far from the one at fault, and all of their DAGs would be missing.
"""

import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable, task
from airflow.sdk.exceptions import AirflowFailException

from breakhis_airflow.operators import DEFAULT_ARGS
from ml.core.errors import BreakhisError, ConfigError
from ml.core.messages import MAX_FAULT, cut_message, cut_text

_INVALID = """
### This file cannot be used
`{file}`

```text
{error}
```

Mend the file. This DAG turns into the real one when Airflow has read the file again, within a minute or so. Until then
a run of it fails with the same message.
"""


def build_dags(files: Iterable[Path], build: Callable[[Path], DAG], *, prefix: str) -> dict[str, DAG]:
    """Returns the DAG of each file, by DAG id.

    Args:
        files: the YAML files.
        build: builds a file's DAG, with ``auto_register=False``, else Airflow would register it even if it is refused.
        prefix: what the DAG ids begin with, for a file whose own DAG cannot be built.
    """
    dags: dict[str, DAG] = {}
    invalid: dict[Path, Exception] = {}
    for file in files:
        try:
            dag = build(file)
            dag.validate()  # Airflow checks the schedule, among others, only when asked
            if dag.dag_id in dags:
                raise ConfigError(f"{file}: another file declares {dag.dag_id} already; give this one another name")
            dags[dag.dag_id] = dag
        except Exception as error:  # an error in one file must not affect the others
            invalid[file] = error
    # Last, so that a file that cannot be used takes no DAG id from a good one of the same name.
    for file, problem in invalid.items():
        dag_id = f"{prefix}_{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)}"
        dag = _build_invalid_dag(file, problem, _make_unique(dag_id, dags))
        dags[dag.dag_id] = dag
    return dags


def make_timetable(schedule: str | None) -> CronTriggerTimetable | None:
    """Returns the timetable of a cron schedule in UTC, for a DAG without a start date; None for None.

    A DAG that is unpaused waits for its next time. With a start date, Airflow would first make up for the last time: a
    monthly DAG that is unpaused and started by hand would run twice.
    """
    if schedule is None:
        return None
    # With False, the first run would be lost if Airflow read the file within the second after its time.
    return CronTriggerTimetable(schedule, timezone="UTC", run_immediately=timedelta(minutes=10))


def source_asset(source: str) -> Asset:
    """Returns the asset that stands for the versions of a source."""
    return Asset(f"breakhis_source_{source}", uri=f"x-breakhis://sources/{source}")


def schedule_on_new_versions(sources: Iterable[str], schedule: str | None) -> AssetAny | AssetOrTimeSchedule:
    """Returns the schedule of a DAG that runs with each new version of a source, and by a cron schedule if given."""
    assets = AssetAny(*map(source_asset, sources))
    timetable = make_timetable(schedule)
    return AssetOrTimeSchedule(timetable=timetable, assets=assets) if timetable else assets


def _build_invalid_dag(file: Path, error: Exception, dag_id: str) -> DAG:
    text = str(error) if isinstance(error, BreakhisError) else cut_message(f"{file}: {cut_text(error)}")

    @task(task_id="read_yaml")
    def refuse() -> None:
        """Fails with what is wrong with the file."""
        raise AirflowFailException(text)

    with DAG(
        dag_id,
        schedule=None,
        is_paused_upon_creation=False,
        default_args={**DEFAULT_ARGS, "pre_execute": None},  # whatever its conf, what is wrong with the file is said
        description=text,
        doc_md=_INVALID.format(file=cut_text(file, MAX_FAULT), error=text),
        tags=["invalid"],
        auto_register=False,
    ) as dag:
        # A stage is not run here: it might see no error in the file, and would then work under another file's name.
        refuse()
    return dag


def _make_unique(dag_id: str, taken: dict[str, DAG]) -> str:
    number = 2
    candidate = dag_id
    while candidate in taken:
        candidate = f"{dag_id}_{number}"
        number += 1
    return candidate
