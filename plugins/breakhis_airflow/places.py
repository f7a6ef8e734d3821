"""Where stages run: the operator class for each, by the setting BREAKHIS_PLACE."""

from collections.abc import Sequence
from typing import Any

from breakhis_airflow.operators import StageOperator
from ml.core.settings import read_settings

COMPUTING = frozenset({"weights", "features", "train"})
"""The stages that a GPU speeds up. At the place ``docker`` these run in containers; the others are light, and a
reviewer's decision must not wait for a Docker engine."""

COMPUTE_QUEUE = "gpu"
"""What Celery workers on machines with a GPU listen to. Executors without queues ignore it."""


def stage(name: str, *arguments: str, **kwargs: Any) -> StageOperator:
    """A task that runs the stage ``name`` at the configured place; its task id is the stage's name unless given."""
    return place_of(name)(stage=name, arguments=arguments, **{**_usual(name), **kwargs})


def mapped_stage(name: str, arguments: Sequence[Sequence[str]], **kwargs: Any) -> Any:
    """A task that runs the stage once for each list of arguments, on as many workers as there are."""
    operator = place_of(name).partial(stage=name, **{**_usual(name), **kwargs})
    return operator.expand(arguments=[list(each) for each in arguments])


def place_of(name: str) -> type[StageOperator]:
    """The operator class of a stage. Imported when asked for: Docker's client takes its time."""
    if name in COMPUTING and read_settings().place == "docker":
        from breakhis_airflow.containers import DockerStageOperator

        return DockerStageOperator
    from breakhis_airflow.process import ProcessStageOperator

    return ProcessStageOperator


def _usual(name: str) -> dict[str, Any]:
    return {"task_id": name} | ({"queue": COMPUTE_QUEUE} if name in COMPUTING else {})
