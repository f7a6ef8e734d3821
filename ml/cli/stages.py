"""The stages as commands. Each only calls the function that does the work, which is documented there."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ml.cli.options import RefusedResult, print_lines, stage_command, version_argument
from ml.core.messages import MAX_ITEMS, cut_text, list_items, quote_value
from ml.core.progress import warn
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, SUBTYPES
from ml.data.sources import load_source
from ml.data.training_sets import assemble_dataset, load_training_set
from ml.training.presets import load_preset, preset_names

if TYPE_CHECKING:
    from ml.data.protocols import ProtocolName
    from ml.data.sources import SourceSpec
    from ml.training.features import Shard

source_argument = click.argument("source", type=click.Path())
set_argument = click.argument("training_set", metavar="SET", type=click.Path())
preset_option = click.option("--preset", type=click.Choice(preset_names()), required=True, help="The training recipe.")
weights_option = click.option(
    "--weights", "weights_id", metavar="ID", help="Weights in the store; default: those that BREAKHIS_WEIGHTS names."
)


class _ShardType(click.ParamType["Shard"]):
    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Shard":
        """Reads ``2/3`` as the second of three parts."""
        from ml.training.features import Shard

        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", str(value))
        if not match or int(match[1]) > int(match[2]):
            self.fail(f"{quote_value(value)} is not a part such as 1/3, 2/3 or 3/3", param, ctx)
        return Shard(int(match[1]), int(match[2]))


@stage_command
@source_argument
def fetch(store: Store, settings: Settings, source: str) -> Json:
    """Bring the files of SOURCE (a name in dags/sources or a .yaml path) into the store as a raw version."""
    from ml.data.sources import fetch_source

    return fetch_source(load_source(source, settings.conf), store, settings)


@stage_command
@source_argument
@click.option("--raw", metavar="ID", help="Raw version to read; default: the source's latest.")
def manifest(store: Store, settings: Settings, source: str, raw: str | None) -> Json:
    """Read every file of SOURCE's raw version into a manifest, and quarantine what cannot be used."""
    return _make_manifest(store, settings, load_source(source, settings.conf), raw)


@stage_command
@click.argument("manifest")
def validate(store: Store, settings: Settings, manifest: str) -> Json:
    """Check MANIFEST with Great Expectations and write Data Docs. Exit status 4 if it does not pass."""
    return _validate_manifest(store, manifest)


@stage_command
@click.argument("manifest")
def publish(store: Store, settings: Settings, manifest: str) -> Json:
    """Make MANIFEST, which must have passed validation, the current version of its source."""
    from ml.data.source_versions import publish_manifest

    return publish_manifest(manifest, store)


@stage_command
@source_argument
def ingest(store: Store, settings: Settings, source: str) -> Json:
    """fetch, manifest, validate and publish SOURCE in one go."""
    from ml.data.source_versions import publish_manifest
    from ml.data.sources import fetch_source

    spec = load_source(source, settings.conf)
    fetched = fetch_source(spec, store, settings)
    made = _make_manifest(store, settings, spec, fetched["version"])
    validated = _validate_manifest(store, made["manifest"])
    published = publish_manifest(made["manifest"], store)
    return {**fetched, "raw": fetched["version"], **made, **validated, **published}


@stage_command
@set_argument
def assemble(store: Store, settings: Settings, training_set: str) -> Json:
    """Make a dataset of the published versions of SET's sources (a name in dags/training_sets or a .yaml path)."""
    return assemble_dataset(load_training_set(training_set, settings.conf), store, settings)


def _print_split(result: Json, arguments: dict[str, Any]) -> None:
    if not arguments["report"]:
        print_lines(result)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table("class", title=escape(f"{result['split']}: {result['method']}, by {result['group']}"))
    for side in (*SIDES, "all"):
        grid.add_column(f"{side}\nimages / slides / cases", justify="right")
    units = ("images", "slides", "cases")
    for subtype in SUBTYPES:
        counts = [[result[side][f"{unit}_by_subtype"][subtype] for unit in units] for side in SIDES]
        grid.add_row(subtype, *_format_counts(counts))
    grid.add_section()
    grid.add_row("all", *_format_counts([[result[side][unit] for unit in units] for side in SIDES]))
    console = Console(width=max(Console().width, 120))
    console.print(grid)
    if result["group"] == "slide":
        console.print("A case whose slides lie on several sides counts once on each.")
    for subtype, reason in result["not_estimable_because"].items():
        console.print(escape(f"not estimable: {subtype}, no case in test: {reason}"))
    for reason, images in result["quarantined"].items():
        console.print(escape(f"quarantined: {images} image(s): {reason}"))
    console.print(escape(f"ledger {result['ledger']} {result['ledger_hash']}"))


def _format_counts(counts: list[list[int]]) -> list[str]:
    """Returns the counts of each side, and their sums, as texts such as ``12 / 3 / 2``."""
    return [" / ".join(str(n) for n in numbers) for numbers in (*counts, [sum(n) for n in zip(*counts, strict=True)])]


@partial(stage_command, show=_print_split)
@click.argument("dataset")
@click.option("--report", is_flag=True, help="Show images, slides and cases of each class on each side as a table.")
def split(store: Store, settings: Settings, dataset: str, report: bool) -> Json:
    """Put every case of DATASET on its side of the ledger: train, validation or test."""
    # --report changes what is printed, not the result.
    from ml.data.splits import split_dataset

    return split_dataset(dataset, store)


@stage_command
@click.option("--preset", type=click.Choice(preset_names()), help="A recipe, which may allow random weights instead.")
def weights(store: Store, settings: Settings, preset: str | None) -> Json:
    """Bring the backbone's weights (BREAKHIS_WEIGHTS) into the store, once, for every later stage."""
    from ml.training.backbone_weights import fetch_weights

    allow_random = preset is not None and load_preset(preset).random_weights_allowed
    return fetch_weights(settings.weights, store, allow_random=allow_random)


@stage_command
@click.argument("dataset")
@preset_option
@weights_option
@click.option("--split", metavar="ID", help="Compute augmented views only of images on its train and validation sides.")
@click.option(
    "--shard",
    type=_ShardType(),
    help="Compute only the I-th of N parts, so that N workers share a dataset's images.",
)
def features(
    store: Store,
    settings: Settings,
    dataset: str,
    preset: str,
    weights_id: str | None,
    split: str | None,
    shard: "Shard | None",
) -> Json:
    """Compute pixels and backbone features of DATASET's images, in each view of PRESET, that are not cached yet."""
    from ml.data.splits import look_up_sides, read_split
    from ml.data.training_sets import read_dataset
    from ml.images.augmentation import plan_shared_views
    from ml.training.features import extract_features

    recipe, rows = load_preset(preset), read_dataset(dataset, store)
    sides = look_up_sides(rows, read_split(split, store)) if split else None
    views = plan_shared_views([recipe.binary.views, recipe.subtype.views], rows, sides)
    plan = [(view, rows.loc[is_used, "pixel_sha256"].tolist()) for view, is_used in views]
    return extract_features(dataset, recipe, store, settings, weights_id=weights_id, shard=shard, plan=plan)


@stage_command
@click.argument("task", type=click.Choice(["binary", "subtype"]))
@click.option("--dataset", required=True, metavar="ID", help="A dataset made by assemble.")
@click.option("--split", required=True, metavar="ID", help="A split of that dataset.")
@preset_option
@weights_option
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of initial weights, order and dropout.")
def train(store: Store, settings: Settings, **arguments: Any) -> Json:
    """Train the binary or the subtype model and log run, metrics, plots and model to MLflow."""
    from ml.training.run import train as train_model

    arguments["preset"] = load_preset(arguments["preset"])
    return train_model(store=store, settings=settings, **arguments)


def _print_reproduction(result: Json, _: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ml.training.reproduction import column_headings, format_tables, table_notes

    console = Console(width=max(Console().width, 120))
    for title, lines in format_tables(result):
        grid = Table(*column_headings(result), title=escape(title), title_justify="left")
        for line in lines:
            grid.add_row(*map(escape, line))
        console.print(grid)
    for note in table_notes(result):
        console.print(escape(note))
    console.print(escape(f"{result['output']}/table.md; MLflow run {result['run_id']}"))


@partial(stage_command, show=_print_reproduction)
@set_argument
@click.option(
    "--preset",
    "presets",
    type=click.Choice(preset_names()),
    multiple=True,
    default=("paper", "default"),
    show_default=True,
    help="What is compared; the last with the first.",
)
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["notebooks", "ledger", "spanhol"]),
    multiple=True,
    default=("notebooks", "ledger"),
    show_default=True,
    help="How patients are split. spanhol has five folds and takes five times as long.",
)
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Trainings of each.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the table; what it has already is not trained again. Default: reproduction-SET.",
)
@weights_option
def reproduce(
    store: Store,
    settings: Settings,
    training_set: str,
    presets: tuple[str, ...],
    protocols: tuple["ProtocolName", ...],
    seeds: int,
    output: Path | None,
    weights_id: str | None,
) -> Json:
    """Train presets side by side on the published sources of SET: the notebooks' figures and ours in one table.

    SET is a name in dags/training_sets or a .yaml path. Stopped, it goes on where it was when called again.
    """
    from ml.training.reproduction import reproduce as reproduce_presets

    loaded = load_training_set(training_set, settings.conf)
    return reproduce_presets(
        loaded,
        protocols=list(dict.fromkeys(protocols)),
        presets=[load_preset(name) for name in dict.fromkeys(presets)],
        seeds=seeds,
        output=output or Path(f"reproduction-{loaded.name}"),
        store=store,
        settings=settings,
        weights_id=weights_id,
    )


@stage_command
@set_argument
def origin(store: Store, settings: Settings, training_set: str) -> Json:
    """Write down for good who started the run of a DAG that trains SET: they cannot approve its models."""
    from ml.data.training_sets import load_training_set
    from ml.promotion.starters import record_starters

    return record_starters(load_training_set(training_set, settings.conf), store, settings)


@stage_command
@click.argument("run")
def register(store: Store, settings: Settings, run: str) -> Json:
    """Make a registered model version of a finished RUN, with the alias 'candidate' and an evidence bundle."""
    from ml.promotion.registration import register_run

    return register_run(run, store, settings)


@stage_command
@click.argument("model")
@version_argument
@click.option("--evidence", metavar="ID", help="Judge exactly this evidence; default: the version's own.")
@click.option(
    "--policy", metavar="FILE", type=click.Path(), help="Judge under another policy, to see what its gates would say."
)
def gate(store: Store, settings: Settings, model: str, version: str, evidence: str | None, policy: str | None) -> Json:
    """Hold a MODEL's VERSION against its promotion policy. Exit status 4 if a gate blocks it."""
    from ml.promotion.judging import judge_version
    from ml.registry.registered_model import require_known_model

    require_known_model(model, settings)
    result = judge_version(model, version, store, settings, evidence=evidence, policy=policy)
    if not result["passed"]:
        raise RefusedResult(result, result["summary"])
    return result


@stage_command
@click.argument("model")
@version_argument
@click.option("--dag-run", required=True, metavar="RUN_ID", help="The run of the DAG promote whose review decided.")
@click.option("--evidence", metavar="ID", help="Promote only if this is the version's evidence.")
def promote(store: Store, settings: Settings, model: str, version: str, dag_run: str, evidence: str | None) -> Json:
    """Carry out the reviewers' decision on MODEL's VERSION, as Airflow recorded it; gates are checked again."""
    from ml.promotion.decisions import promote_version
    from ml.registry.registered_model import require_known_model

    require_known_model(model, settings)
    return promote_version(model, version, dag_run, store, settings, evidence=evidence)


@stage_command
@click.argument("model")
@version_argument
@click.option("--dag-run", metavar="RUN_ID", help="The run of the DAG rollback whose review decided.")
@click.option("--dry-run", is_flag=True, help="Say what it would do, for the review; needs --reason.")
@click.option("--reason", help="Why, with --dry-run.")
@click.option("--although-withdrawn", type=bool, default=False, help="Whether VERSION may be a withdrawn one.")
def rollback(
    store: Store,
    settings: Settings,
    model: str,
    version: str,
    dag_run: str | None,
    dry_run: bool,
    reason: str | None,
    although_withdrawn: bool,
) -> Json:
    """Make a former champion, MODEL's VERSION, the champion again, once a reviewer has confirmed it in Airflow."""
    from ml.promotion.decisions import propose_rollback, roll_back
    from ml.registry.registered_model import require_known_model

    require_known_model(model, settings)
    if dry_run:
        return propose_rollback(model, version, reason or "", store, settings, although_withdrawn=although_withdrawn)
    if not dag_run:
        raise click.UsageError("say --dag-run, the run of the DAG rollback; or --dry-run")
    return roll_back(model, version, dag_run, store, settings)


@stage_command
@click.argument("model")
@version_argument
@click.option("--dag-run", required=True, metavar="RUN_ID", help="The run of the DAG withdraw, with who and why.")
def withdraw(store: Store, settings: Settings, model: str, version: str, dag_run: str) -> Json:
    """Take back MODEL's VERSION, a waiting candidate: it can be approved no more."""
    from ml.promotion.decisions import withdraw_version
    from ml.registry.registered_model import require_known_model

    require_known_model(model, settings)
    return withdraw_version(model, version, dag_run, store, settings)


def _make_manifest(store: Store, settings: Settings, spec: "SourceSpec", raw: str | None) -> Json:
    from ml.data.manifest import make_manifest

    limits = settings.decoding_bytes, settings.table_rows, settings.decoding_seconds
    return make_manifest(spec, store, settings.worker_count, raw, *limits)


def _validate_manifest(store: Store, manifest: str) -> Json:
    from ml.data.validation import validate_manifest

    result = validate_manifest(manifest, store)
    for check in result["warned"][:MAX_ITEMS]:
        warn(f"{result['source']}: the check {cut_text(check['name'])} found {cut_text(check['observed'])}")
    if (more := len(result["warned"]) - MAX_ITEMS) > 0:
        warn(f"{result['source']}: and {more:,} more checks; see {result['docs']}")
    if not result["passed"]:
        names = [check["name"] for check in [*result["failed"], *result["errored"]]]
        raise RefusedResult(result, f"{manifest} did not pass validation: {list_items(names)}; see {result['docs']}")
    return result


_DATA = [fetch, manifest, validate, publish, ingest, assemble, split]
_TRAINING = [weights, features, train, reproduce]
_PROMOTION = [origin, register, gate, promote, rollback, withdraw]
STAGES = [*_DATA, *_TRAINING, *_PROMOTION]
