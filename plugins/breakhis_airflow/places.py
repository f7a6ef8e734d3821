"""Makes the tasks of stages, each with the operator class of the place at which it runs: setting BREAKHIS_PLACE."""

from collections.abc import Sequence
from typing import Any

from breakhis_airflow.operators import StageOperator
from ml.core.settings import read_settings

COMPUTING_STAGES = frozenset({"weights", "features", "train"})
"""The stages that a GPU speeds up. At the place ``docker`` only these run in containers: the others are light, and a
reviewer's decision must not wait for a Docker engine."""

COMPUTE_QUEUE = "gpu"
"""The queue of Celery workers on machines with a GPU. Executors without queues ignore it."""


def stage(name: str, *arguments: str, **kwargs: Any) -> StageOperator:
    """Returns a task that runs the stage ``name``. Its task id is the stage's name unless ``kwargs`` have another."""
    return find_operator_class(name)(stage=name, arguments=arguments, **{**_default_arguments(name), **kwargs})


def mapped_stage(name: str, arguments: Sequence[Sequence[str]], **kwargs: Any) -> Any:
    """Returns a mapped task that runs the stage once for each list of arguments, on as many workers as there are."""
    operator = find_operator_class(name).partial(stage=name, **{**_default_arguments(name), **kwargs})
    return operator.expand(arguments=[list(each) for each in arguments])


def find_operator_class(name: str) -> type[StageOperator]:
    """Returns the operator class of a stage. It is imported here, since Docker's client takes long to import."""
    if name in COMPUTING_STAGES and read_settings().place == "docker":
        from breakhis_airflow.containers import DockerStageOperator

        return DockerStageOperator
    from breakhis_airflow.process import ProcessStageOperator

    return ProcessStageOperator


def _default_arguments(name: str) -> dict[str, Any]:
    return {"task_id": name} | ({"queue": COMPUTE_QUEUE} if name in COMPUTING_STAGES else {})
