"""Comparison of presets with the notebooks' figures, in one table: the same protocols and patients, several seeds.

The output folder keeps each finished training. A comparison that was stopped therefore resumes where it was, and more
seeds or presets cost only their own trainings.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import ConfigError
from ml.core.hashes import digest
from ml.core.mlflow_client import use_experiment
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import TASKS, Task
from ml.data.protocols import ProtocolName, ProtocolSplit, make_protocol_splits
from ml.data.splits import split_dataset
from ml.data.training_sets import TrainingSet, assemble_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.scores import LabelledPredictions
from ml.training.checkpoints import Checkpoint, remove_abandoned, wait_for_concurrent_training
from ml.training.preset_metrics import NEVER_FOUND, PresetMetrics, Row, compute_metrics, compute_rows
from ml.training.presets import Preset
from ml.training.procedure import TrainingData, collect_scores, fit_and_calibrate, prepare_training_data

if TYPE_CHECKING:
    from ml.training.backbone_weights import Weights


def reproduce(
    training_set: TrainingSet,
    *,
    protocols: Sequence[ProtocolName],
    presets: Sequence[Preset],
    seeds: int,
    output: Path,
    store: Store,
    settings: Settings,
    weights_id: str | None = None,
) -> Json:
    """Train each preset under each protocol with each seed, and write one table of their metrics on the test sides.

    Args:
        training_set: the training set; the published versions of its sources are used.
        protocols: see :func:`ml.data.protocols.make_protocol_splits`.
        presets: the presets; the last is compared with the first.
        seeds: number of trainings of each; the sides stay the same.
        output: folder for table.md, table.csv, reproduction.json, comparison.png and trainings/; made if missing.
        store: the store that holds versions, datasets, caches and checkpoints.
        settings: weights, backend, MLflow.
        weights_id: weights in the store, instead of those that the settings name.

    Returns:
        ``{dataset, presets, protocols, seeds, trainings, trained, output, run_id, rows}``; ``trained`` counts the
        trainings that were not in the folder already.

    Raises:
        DataError: a source has no published version, or a protocol does not fit the data.
        ConfigError: no preset, protocol or seed is given, or the folder cannot be written.
    """
    if not (presets and protocols and seeds):
        raise ConfigError("nothing to compare: name at least one preset, one protocol and one seed")
    folder = _make_folder(output)
    dataset = assemble_dataset(training_set, store, settings)["dataset"]
    split = split_dataset(dataset, store)["split"]
    remove_abandoned(store)
    rows: list[Row] = []
    count = trained = 0
    kinds: set[Weights] = set()
    for protocol, task in product(protocols, TASKS):
        measured, used, new = _measure_presets(
            protocol, task, dataset, presets, seeds, folder, store, settings, weights_id
        )
        count, trained = count + seeds * sum(map(len, measured.values())), trained + new
        kinds |= used
        rows += compute_rows(protocol, task, measured)
    facts: Json = {
        "dataset": dataset,
        "split": split,
        "set": training_set.name,
        "presets": [preset.name for preset in presets],
        "protocols": list(protocols),
        "seeds": seeds,
        "weights": {weights.id: weights.kind for weights in sorted(kinds)},
        "trainings": count,
        "rows": [row.to_json() for row in rows],
    }
    _write(facts, output)
    return {**facts, "trained": trained, "output": str(output), "run_id": _log(facts, output, settings)}


def _make_folder(output: Path) -> Path:
    """Make the folder of the trainings and return it."""
    folder = output / "trainings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}; name a folder that can be written") from None
    return folder


def _measure_presets(
    protocol: ProtocolName,
    task: Task,
    dataset: str,
    presets: Sequence[Preset],
    seeds: int,
    folder: Path,
    store: Store,
    settings: Settings,
    weights_id: str | None,
) -> tuple[dict[str, list[PresetMetrics]], "set[Weights]", int]:
    """Train each preset on each split of a protocol with each seed, unless ``folder`` holds the training already.

    Returns:
        preset -> its metrics on each split; the backbone weights that were used; how many trainings were done.
    """
    draws = max(preset.bootstrap_draws for preset in presets)  # the same for all presets, or nothing could be paired
    measured: dict[str, list[PresetMetrics]] = {preset.name: [] for preset in presets}
    used: set[Weights] = set()
    trained = 0
    for protocol_split, preset in product(make_protocol_splits(protocol, task, dataset, store), presets):
        with prepare_training_data(task, dataset, protocol_split.split, preset, store, settings, weights_id) as data:
            used.add(data.weights)
            scores = [_train_or_read(protocol_split, task, preset, seed, data, folder, store) for seed in range(seeds)]
        trained += sum(is_new for _, is_new in scores)
        measured[preset.name].append(compute_metrics([predictions for predictions, _ in scores], draws))
    return measured, used, trained


def _train_or_read(
    protocol_split: ProtocolSplit, task: Task, preset: Preset, seed: int, data: TrainingData, folder: Path, store: Store
) -> tuple[LabelledPredictions, bool]:
    """Returns the predictions of the test side, and whether they had to be computed."""
    name = f"{protocol_split.name} {task} {preset.name} seed {seed}"
    file, test = folder / f"{name.replace(' ', '-')}.npz", data.rows_by_side["test"]
    job = digest(["reproduction", data.inputs_digest, seed])
    kept, left = _read(file, job), None
    if kept is None:
        left = wait_for_concurrent_training(store, job)
        kept = _read(file, job)  # the other process may have written it
    if kept is None:
        checkpoint, start = Checkpoint(store, job, left), time.monotonic()
        with checkpoint.alive():
            trained_model = fit_and_calibrate(task, preset.recipe(task), seed, data, checkpoint, store)
            scores = collect_scores(task, trained_model, data)["test"]
            rule = trained_model.selected.rule
            _keep(file, job, scores.probabilities, rule)
            checkpoint.forget()
        say(f"{name}: trained in {time.monotonic() - start:.0f} s")
        return scores, True
    say(f"{name}: already in {folder}, not trained again")
    return LabelledPredictions(task, data.rows.iloc[test], data.truth[test], *kept), False


def _keep(file: Path, job: str, probabilities: NDArray[np.float64], rule: DecisionRule) -> None:
    whole = io.BytesIO()
    np.savez(whole, job=np.array(job), probabilities=probabilities, rule=np.array(json.dumps(rule.to_json())))
    scratch = file.with_suffix(".partial")
    scratch.write_bytes(whole.getvalue())
    scratch.replace(file)


def _read(file: Path, job: str) -> tuple[NDArray[np.float64], DecisionRule] | None:
    """Returns the kept probabilities and rule of this training, or None if the file is of other inputs or missing."""
    if not file.is_file():
        return None
    with np.load(file) as kept:
        if str(kept["job"]) != job:
            return None
        return kept["probabilities"], DecisionRule.from_json(json.loads(str(kept["rule"])))


def format_row(row: Json) -> list[str]:
    """Returns a row's texts: metric, the notebooks' figure, each preset's with its interval, and the difference."""

    def format_figure(figure: Json | None, sign: str = "") -> str:
        if figure is None:
            return ""
        ends = f" [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]" if figure["low"] is not None else ""
        return f"{figure['value']:{sign}.3f}{ends}"

    notebooks = f"{row['notebooks']:.3f}" if row["notebooks"] is not None else ""
    return [
        row["metric"],
        notebooks,
        *map(format_figure, row["presets"].values()),
        format_figure(row["difference"], "+"),
    ]


def column_headings(facts: Json) -> list[str]:
    """Returns the column headings of :func:`format_row`."""
    presets = facts["presets"]
    return ["metric", "notebooks", *presets, f"{presets[-1]} - {presets[0]}" if len(presets) > 1 else "difference"]


def table_notes(facts: Json) -> list[str]:
    """Returns the notes that a reader of the table needs."""
    notes = [
        f"Data set {facts['dataset']} of the training set {facts['set']}; test sides; means over {facts['seeds']} "
        "seed(s), with 95% intervals by bootstrap draws of patients. The difference is paired: it uses the same draws. "
        "There is no interval where every draw gives the same value.",
        "The notebooks' figures are on their own split, which is not known; they have no intervals.",
        "notebooks and spanhol split by slide, as published work does: slides of one patient may lie on two sides.",
    ]
    if "spanhol" in facts["protocols"]:
        notes.append(
            "spanhol: mean over the five folds, with one standard deviation to both sides; one model for all "
            "magnifications, where the authors trained one for each."
        )
    if _has_random_weights(facts):
        notes.append(_RANDOM_WEIGHTS_WARNING)
    return notes


_RANDOM_WEIGHTS_WARNING = (
    "RANDOM BACKBONE WEIGHTS: these figures do not show what the recipes reach with ImageNet weights."
)


def _has_random_weights(facts: Json) -> bool:
    return "random" in facts["weights"].values()


def format_tables(facts: Json) -> Iterator[tuple[str, list[list[str]]]]:
    """Yields the table in parts: a title, and the rows as :func:`format_row` returns them."""
    for (protocol, task, level), part in groupby(facts["rows"], key=itemgetter("protocol", "task", "level")):
        yield f"{protocol}, {task}, by {level}", [format_row(row) for row in part]


def _write(facts: Json, output: Path) -> None:
    from ml.evaluation.figures import plot_comparison

    whole = {**facts, "notes": table_notes(facts)}
    (output / "reproduction.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    heads = column_headings(facts)
    lines = ["# The notebooks' recipe and ours", "", *(f"- {note}" for note in table_notes(facts))]
    for title, part in format_tables(facts):
        lines += ["", f"## {title}", "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        lines += [f"| {' | '.join(line)} |" for line in part]
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (output / "table.csv").open("w", encoding="utf-8", newline="") as file:
        ends = [f"{name}{end}" for name in (*facts["presets"], "difference") for end in ("", "_low", "_high")]
        writer = csv.writer(file)
        keys = ("protocol", "task", "level", "metric", "notebooks")
        writer.writerow([*keys, *ends])
        for row in facts["rows"]:
            figures = [*row["presets"].values(), row["difference"] or {}]
            writer.writerow(
                [*(row[k] for k in keys), *(f.get(end) for f in figures for end in ("value", "low", "high"))]
            )
    title = f"{facts['set']}: means over {facts['seeds']} seed(s); table.md explains the intervals"
    if _has_random_weights(facts):
        title += f"\n{_RANDOM_WEIGHTS_WARNING}"
    compared = [row for row in facts["rows"] if row["metric"] != NEVER_FOUND]
    plot_comparison(compared, title, output / "comparison.png")


def _log(facts: Json, output: Path, settings: Settings) -> str:
    use_experiment(facts["set"], settings)
    import mlflow

    with mlflow.start_run(run_name="reproduce") as run:
        tags = {name: facts[name] for name in ("dataset", "split", "set")}
        mlflow.set_tags({f"breakhis.{name}": value for name, value in {**tags, "kind": "reproduction"}.items()})
        mlflow.log_params({name: ", ".join(facts[name]) for name in ("presets", "protocols", "weights")})
        mlflow.log_param("seeds", facts["seeds"])
        mlflow.log_metrics(
            {
                f"{row['protocol']}_{row['task']}_{preset}_{row['metric']}": figure["value"]
                for row in facts["rows"]
                for preset, figure in row["presets"].items()
            }
        )
        for name in ("table.md", "table.csv", "reproduction.json", "comparison.png"):
            mlflow.log_artifact(str(output / name))
        return str(run.info.run_id)
