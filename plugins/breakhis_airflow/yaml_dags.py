"""DAGs made of YAML files, one DAG a file; a file that cannot be used disturbs none of the others.

Such a file's DAG is there all the same, tagged ``invalid``, and says what is wrong. The alternative, an import error,
would stand against the DAG file that reads all of them, far from the YAML at fault, and take every other DAG with it.
"""

import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable, task
from airflow.sdk.exceptions import AirflowFailException

from breakhis_airflow.operators import DEFAULT_ARGS
from ml.core.errors import BreakhisError, ConfigError

_INVALID = """
### This file cannot be used
`{file}`

```text
{error}
```

Mend the file. This DAG turns into the real one when Airflow has read the file again, within a minute or so. Until then
a run of it fails with the same words.
"""


def build_dags(files: Iterable[Path], build: Callable[[Path], DAG], *, prefix: str) -> dict[str, DAG]:
    """The DAG of each file, by DAG id.

    Args:
        files: the YAML files.
        build: makes a file's DAG, with ``auto_register=False``: Airflow would pick up a DAG even if it is refused here.
        prefix: what the DAG ids begin with, for a file that does not get as far as having a name.
    """
    found: dict[str, DAG] = {}
    for file in files:
        try:
            dag = build(file)
            dag.validate()  # the schedule, among others: Airflow looks at its fields only when asked
            if dag.dag_id in found:
                raise ConfigError(f"{file}: another file declares {dag.dag_id} already; give this one another name")
        except Exception as error:  # whatever is wrong with one file must not take the others down
            dag = _build_invalid_dag(
                file, error, _make_unique(f"{prefix}_{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)}", found)
            )
        found[dag.dag_id] = dag
    return found


def make_timetable(schedule: str | None) -> CronTriggerTimetable | None:
    """The timetable of a schedule in YAML, in UTC, for a DAG without a start date.

    A DAG that is unpaused waits for its next time. With a start date Airflow would first make up for the last time, so
    that whoever unpauses a monthly DAG and starts it finds two runs.
    """
    if schedule is None:
        return None
    # Not exactly False: its first time would be lost, should Airflow read the file between that second and the next.
    return CronTriggerTimetable(schedule, timezone="UTC", run_immediately=timedelta(minutes=10))


def source_asset(source: str) -> Asset:
    """The asset that stands for the versions of a source."""
    return Asset(f"breakhis_source_{source}", uri=f"x-breakhis://sources/{source}")


def schedule_on_new_versions(sources: Iterable[str], schedule: str | None) -> AssetAny | AssetOrTimeSchedule:
    """When something that is made of sources runs: with each new version of one of them, and by its schedule."""
    outlet_asset = AssetAny(*map(source_asset, sources))
    timetable = make_timetable(schedule)
    return AssetOrTimeSchedule(timetable=timetable, assets=outlet_asset) if timetable else outlet_asset


def _build_invalid_dag(file: Path, error: Exception, dag_id: str) -> DAG:
    text = str(error) if isinstance(error, BreakhisError) else f"{file}: {error}"

    @task(task_id="read_yaml")
    def refuse() -> None:
        """Fail with what is wrong with the file."""
        raise AirflowFailException(text)

    with DAG(
        dag_id,
        schedule=None,
        is_paused_upon_creation=False,
        default_args=DEFAULT_ARGS,
        description=text,
        doc_md=_INVALID.format(file=file, error=text),
        tags=["invalid"],
        auto_register=False,
    ) as dag:
        # Not a stage on the file: it might see no fault, and would then work under a name that is another's.
        refuse()
    return dag


def _make_unique(dag_id: str, taken: dict[str, DAG]) -> str:
    number = 2
    candidate = dag_id
    while candidate in taken:
        candidate = f"{dag_id}_{number}"
        number += 1
    return candidate
