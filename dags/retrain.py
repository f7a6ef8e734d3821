"""One DAG per training set: ``retrain_<name>`` for every YAML file in training_sets/ and in BREAKHIS_TRAINING_SETS."""

from pathlib import Path

from airflow.sdk import DAG, Param

from breakhis_airflow.operators import DEFAULT_ARGS, StageOperator
from breakhis_airflow.places import mapped_stage, stage
from breakhis_airflow.promotion_trigger import PromotionTrigger
from breakhis_airflow.yaml_dags import build_dags, schedule_on_new_versions
from ml.core.settings import read_settings
from ml.data.sources import source_name
from ml.data.training_sets import TrainingSet, load_training_set, training_set_files
from ml.training.presets import preset_names

SETTINGS = read_settings()

DOC = """
{description}

| | |
|---|---|
{facts}

### What a run does
1. **origin** writes down for good who started the run; without that, nobody may approve its models.
   **assemble** takes the current version of each source; **split** puts every new case on a side for good; **weights**
   fetches the backbone's weights, once; **features** looks at the pictures once, on as many workers as there are, so
   that a second run only looks at new ones.
2. **train_binary** (benign or malignant) and **train_subtype** (eight tumour types) train in the pool `gpu`. The end of
   a task's log and its *Details* lead to the **MLflow run** with curves, metrics and artifacts.
3. **register_…** makes each trained model a new version in the registry, a *candidate*.
   What was trained before from the same data, recipe, weights and seed is not trained again: the run ends quickly, its
   candidates are the versions there are, and 4 is skipped where these were handed over already. The log and the XCom of
   **trigger_promote_…** then say what was compared: dataset, split, ledger, recipe, weights and seed.
4. **trigger_promote_…** hands each candidate to the DAG `promote`, where its gates are checked and a reviewer is asked.
   Nothing becomes the champion here.

### Starting it by hand
Press *Trigger*; the form has the recipe and the seed. Whoever starts a run cannot be the one who approves its models.
A new DAG is paused: unpause it to have it run by its schedule, and whenever a source has a new version.
"""


def build_retrain_dag(file: Path) -> DAG:
    """Builds the DAG of a training set."""
    training_set = load_training_set(str(file), SETTINGS.conf)
    # A training set in the conf folder is named, since a path holds on this machine only.
    reference = file.stem if file.parent == SETTINGS.conf / "training_sets" else str(file.resolve())
    with DAG(
        f"retrain_{training_set.name}",
        description=training_set.description.strip() or f"Retrain on {', '.join(training_set.sources)}.",
        doc_md=write_documentation(training_set),
        schedule=schedule_on_new_versions(map(source_name, training_set.sources), training_set.schedule),
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=True,
        default_args=DEFAULT_ARGS,
        params=make_form(training_set),
        tags=["retrain"],
        auto_register=False,
    ) as dag:
        origin = stage("origin", "--", reference, connections=["breakhis_airflow", "breakhis_audit"])
        assemble = stage("assemble", "--", reference)
        dataset = assemble.value("dataset")
        split = stage("split", "--", dataset)
        weights = stage("weights", "--preset", "{{ params.preset }}")
        recipe = ("--preset", "{{ params.preset }}", "--weights", weights.value("weights"))
        shards = [
            (*recipe, "--split", split.value("split"), "--shard", f"{n}/{SETTINGS.shards}", "--", dataset)
            for n in range(1, SETTINGS.shards + 1)
        ]
        features = mapped_stage("features", shards, pool="gpu")
        assemble >> split
        [split, weights] >> features
        for task, model in training_set.models.items():
            train = stage(
                "train",
                *("--dataset", dataset, "--split", split.value("split")),
                *(*recipe, "--seed", "{{ params.seed }}", "--", task),
                task_id=f"train_{task}",
                pool="gpu",
            )
            register = stage(
                "register",
                *("--", train.value("run_id")),
                task_id=f"register_{task}",
                connections=["breakhis_audit", "breakhis_mlflow_promoter"],
            )
            origin >> register
            features >> train >> register >> _trigger_promotion(task, model, register)
    return dag


def _trigger_promotion(task: str, model: str, register: StageOperator) -> PromotionTrigger:
    """Returns a task that hands the version of a task ``register`` over to the DAG ``promote``."""
    return PromotionTrigger(
        task_id=f"trigger_promote_{task}",
        trained_by=f"train_{task}",
        trigger_dag_id="promote",
        trigger_run_id=f"{model}-v{register.value('version')}",
        conf={
            **{key: register.value(key) for key in ("model", "version", "evidence")},
            # Whoever started this run cannot approve the version.
            "origin": {"dag": "{{ dag.dag_id }}", "run": "{{ run_id }}"},
        },
        # Two candidates may come at the same moment, and a logical date belongs to one run only.
        logical_date=None,
        # A run that is registered again is the same version, which was handed over already.
        skip_when_already_exists=True,
    )


def make_form(training_set: TrainingSet) -> dict[str, Param]:
    """Returns the form for starting a run by hand, with the training set's recipe and seed filled in."""
    return {
        "preset": Param(
            training_set.preset,
            type="string",
            enum=preset_names(),
            title="Recipe",
            description="default: ours. paper: the published notebooks' recipe. demo: small and quick, for trying.",
        ),
        "seed": Param(
            training_set.seed,
            type="integer",
            minimum=0,
            title="Seed of the training",
            description="The same data, recipe and seed train the same model. The split does not depend on it.",
        ),
    }


def write_documentation(training_set: TrainingSet) -> str:
    """Returns the DAG's documentation: what the YAML file declares, and what a run does."""
    facts = {
        "File": training_set.file,
        "Sources": ", ".join(training_set.sources),
        "Models": ", ".join(training_set.models.values()),
        "Split ledger": f"{training_set.ledger}: {training_set.split.method}, by {training_set.split.group}",
        "Promotion policy": training_set.policy,
        "Recipe": training_set.preset,
        "Runs": f"with new data{f', and {training_set.schedule}' if training_set.schedule else ''}",
    }
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in facts.items())
    return DOC.format(description=training_set.description.strip(), facts=rows)


globals().update(build_dags(training_set_files(SETTINGS), build_retrain_dag, prefix="retrain"))
