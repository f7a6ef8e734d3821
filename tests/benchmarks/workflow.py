"""The workflow: every stage from a folder of pictures to two models before their gates, its time and memory."""

from collections.abc import Iterator, Mapping

from ml.core.settings import PROJECT
from tests.benchmarks.measure import Figure, Run, breakhis
from tests.benchmarks.replica import Replica

_WORKERS = 2
_POLICY = str(PROJECT / "dags" / "policies" / "default.yaml")


def figures(replica: Replica) -> list[Figure]:
    """A line a stage, in a store of its own, with random weights, which cost what any weights do."""
    with replica.home(_WORKERS, WEIGHTS="random") as (_, environment):
        runs = dict(stages(environment))
    told = [Figure(f"{name}, {replica.images:,} images", *_told(run)) for name, run in runs.items()]
    minutes = sum(run.seconds for run in runs.values()) / 60
    most = max(run.memory for run in runs.values()) / 2**20
    return [*told, Figure("all stages, one after the other", f"{minutes:.1f} min, {most:.0f} MiB at the most")]


def stages(environment: Mapping[str, str], preset: str = "default") -> Iterator[tuple[str, Run]]:
    """Run them one after the other, as the DAGs do."""
    for name in ("fetch", "manifest"):
        run = breakhis(name, "replica", environment=environment)
        yield name, run
    manifest = run.result["manifest"]
    for name in ("validate", "publish"):
        yield name, breakhis(name, manifest, environment=environment)
    run = breakhis("assemble", "replica", environment=environment)
    yield "assemble", run
    dataset = run.result["dataset"]
    run = breakhis("split", dataset, environment=environment)
    yield "split", run
    split = run.result["split"]
    yield "weights", breakhis("weights", "--preset", preset, environment=environment)
    recipe = ("--preset", preset, "--split", split)
    yield f"features, {preset}", breakhis("features", dataset, *recipe, environment=environment)
    for task in ("binary", "subtype"):
        run = breakhis("train", task, "--dataset", dataset, *recipe, environment=environment)
        yield f"train {task}, {preset}", run
        run = breakhis("register", run.result["run_id"], environment=environment)
        yield f"register {task}", run
        version = (run.result["model"], str(run.result["version"]))
        # The weights are random, so it blocks; that takes as long.
        yield f"gate {task}", breakhis("gate", *version, "--policy", _POLICY, environment=environment, may_say_no=True)


def _told(run: Run) -> tuple[str]:
    counted = f", {run.result['extracted']:,} vectors" if "extracted" in run.result else ""
    return (f"{run.seconds:.1f} s{counted}, {run.memory / 2**20:.0f} MiB anonymous",)
