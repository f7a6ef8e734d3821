"""One DAG per data source: ``ingest_<name>`` for each YAML file in sources/ and each that a training set refers to."""

from pathlib import Path
from typing import Any

from airflow.sdk import DAG

from breakhis_airflow.addresses import build_page_url
from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage
from breakhis_airflow.yaml_dags import build_dags, make_timetable, source_asset
from ml.core.settings import read_settings
from ml.data.sources import SourceSpec, load_source, source_files

SETTINGS = read_settings()

DOC = """
{description}

| | |
|---|---|
{facts}

**[Report of the current version]({current})**: what was checked, what was found, and what is in quarantine.
{more}
### What a run does
1. **fetch** copies the source's files into the store. Files that are there already are not copied again.
2. **manifest** reads every picture and lists it once, under its case, slide, subtype and magnification. What cannot be
   used is set aside with a reason; the counts are in the task's XCom.
3. **validate** checks that list. **Data Docs**, the report, and **Quarantine**, a row for each file that was set aside,
   open from the task's *Details* and from the end of its log; after a failure too.
4. **publish** makes the list the current version of the source, which training sets then take, and tells Airflow of it
   by an asset event: retrainings that are unpaused start. Unchanged files make no new version and start nothing.

When **validate** fails, nothing is published and the last good version stays in use. Read the report, mend the files or
the YAML, and start a new run. What cannot get better by itself (a wrong file, a failed check) is not tried again; after
a lost network or machine a task is, twice. Who is told of a failure stands in `notifications.yaml`.
"""


def build_ingest_dag(file: Path) -> DAG:
    """Builds the DAG of a source."""
    source = load_source(file, SETTINGS.conf)
    # A source in the conf folder is named, since a path holds on this machine only.
    reference = source.name if file.parent == SETTINGS.conf / "sources" else str(file)
    with DAG(
        f"ingest_{source.name}",
        description=f"{source.kind}: {source.description.strip()}",
        doc_md=write_documentation(source),
        schedule=make_timetable(source.schedule),
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,
        default_args=DEFAULT_ARGS,
        tags=["ingest", source.kind],
        auto_register=False,
    ) as dag:
        connection = getattr(source, "connection", None)
        fetch = stage("fetch", "--", reference, connections=[connection] if connection else [])
        manifest = stage("manifest", "--raw", fetch.value("version"), "--", reference)
        validate = stage("validate", "--", manifest.value("manifest"))
        publish = stage("publish", "--", manifest.value("manifest"), outlet_asset=source_asset(source.name))
        fetch >> manifest >> validate >> publish
    return dag


def write_documentation(source: SourceSpec) -> str:
    """Returns the DAG's documentation: what the YAML file declares, and what a run does."""
    shown_apart = {"name", "kind", "description", "inventory", "schedule", "table", "validation"}
    values = source.model_dump(exclude=shown_apart)
    own_values = {key: value for key, value in values.items() if value not in (None, "", {})}
    facts = {
        "File": source.file,
        "Kind": source.kind,
        **{key.capitalize(): value for key, value in own_values.items()},
        "Runs": source.schedule or "when somebody starts it",
    }
    if source.layout == "breakhis":
        claim = "the whole of BreakHis: every count is checked" if source.inventory else "a part of BreakHis"
        facts["Claims to be"] = claim
    return DOC.format(
        description=source.description.strip() or f"The source {source.name}.",
        facts=_format_rows(facts),
        current=build_page_url(f"sources/{source.name}"),
        more=_write_columns(source) + _write_validation_changes(source),
    )


def _format_rows(facts: dict[str, Any]) -> str:
    cells = ((name, _format_value(value).replace("|", r"\|")) for name, value in facts.items())
    return "\n".join(f"| {name} | `{value}` |" for name, value in cells)


def _format_value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items())
    return str(value)


def _write_columns(source: SourceSpec) -> str:
    """Returns how a table's columns are read."""
    if not source.table:
        return ""
    columns = {key: value for key, value in source.table.model_dump().items() if value and key != "file"}
    return f"\n### Columns of `{source.table.file}`\n| here | there |\n|---|---|\n{_format_rows(columns)}\n"


def _write_validation_changes(source: SourceSpec) -> str:
    """Returns what the file changes in the validation."""
    changes = source.validation.changes()
    listed = "\n".join(f"- {change}" for change in changes)
    return f"\n### Validated otherwise than usual\n{listed}\n" if changes else ""


globals().update(build_dags(source_files(SETTINGS), build_ingest_dag, prefix="ingest"))
