"""One DAG per data source: ``ingest_<name>`` for each YAML file in sources/ and each that a training set refers to."""

from pathlib import Path

from airflow.sdk import DAG

from breakhis_airflow.declared import cron, dags_of, version_of
from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage
from ml.settings import settings
from ml.sources import SourceSpec, load_source, source_files

SETTINGS = settings()

DOC = """
{description}

| | |
|---|---|
{facts}

### What a run does
1. **fetch** copies the source's files into the store. Files that are there already are not copied again.
2. **manifest** reads every picture and lists it once, under its case, slide, subtype and magnification. What cannot be
   used is set aside with a reason; the counts are in the task's XCom.
3. **validate** checks that list. The report opens from the end of the task's log or its
   *Details* (**Data Docs**), after a failure too.
4. **publish** makes the list the current version of the source, which training sets then take, and tells Airflow of it
   by an asset event: retrainings that are unpaused start. Unchanged files make no new version and start nothing.

When **validate** fails, nothing is published and the last good version stays in use. Read the report, mend the files or
the YAML, and start a new run.
"""


def ingest(file: Path) -> DAG:
    """The DAG of one source."""
    source = load_source(file, SETTINGS.conf)
    # By name where the name finds it: a path is only good on this machine.
    reference = source.name if file.parent == SETTINGS.conf / "sources" else str(file)
    with DAG(
        f"ingest_{source.name}",
        description=f"{source.kind}: {source.description.strip()}",
        doc_md=documentation(source),
        schedule=cron(source.schedule),
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,
        default_args=DEFAULT_ARGS,
        tags=["ingest", source.kind],
        auto_register=False,
    ) as dag:
        own = getattr(source, "connection", None)
        fetch = stage("fetch", reference, connections=[own] if own else [])
        manifest = stage("manifest", reference, "--raw", fetch.value("version"))
        validate = stage("validate", manifest.value("manifest"))
        publish = stage("publish", manifest.value("manifest"), news=version_of(source.name))
        fetch >> manifest >> validate >> publish
    return dag


def documentation(source: SourceSpec) -> str:
    """What the YAML file says, and what a run does with it."""
    own = source.model_dump(exclude={"name", "kind", "description", "inventory", "schedule"}, exclude_none=True)
    facts = {
        "File": source.file,
        "Kind": source.kind,
        **{key.capitalize(): value for key, value in own.items()},
        "Runs": source.schedule or "when somebody starts it",
    }
    if source.layout == "breakhis":
        claim = "the whole of BreakHis: every count is checked" if source.inventory else "a part of BreakHis"
        facts["Claims to be"] = claim
    rows = "\n".join(f"| {what} | `{value}` |" for what, value in facts.items())
    return DOC.format(description=source.description.strip() or f"The source {source.name}.", facts=rows)


globals().update(dags_of(source_files(SETTINGS), ingest, prefix="ingest"))
