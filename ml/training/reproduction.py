"""The notebooks' figures, their recipe and ours in one table: the same protocols, the same patients, several seeds.

Each training that is done is kept in the output folder, so that a comparison that was stopped goes on where it was, and
one with more seeds or presets costs only these.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import ConfigError
from ml.core.mlflow_client import use_experiment
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest
from ml.core.taxonomy import MAGNIFICATIONS, TASKS, Task
from ml.data.protocols import ProtocolName, ProtocolSplit, make_protocol_splits
from ml.data.splits import split_dataset
from ml.data.training_sets import TrainingSet, assemble_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import bootstrap_weights, confidence_interval, has_resampling_variance
from ml.evaluation.metrics import compute_weighted_metrics
from ml.evaluation.scores import LabelledPredictions
from ml.training.checkpoints import Checkpoint, remove_abandoned, wait_for_concurrent_training
from ml.training.presets import Preset
from ml.training.procedure import TrainingData, collect_scores, fit_and_calibrate, prepare_training_data

if TYPE_CHECKING:
    from ml.training.backbone_weights import Weights

Draws = NDArray[np.float64]

NOTEBOOKS: dict[Task, dict[str, float]] = {
    "binary": {"roc_auc": 0.853, "pr_auc": 0.893, "recall": 0.888, "specificity": 0.576},
    "subtype": {"micro_f1": 0.788, "macro_f1": 0.327},
}
"""The test results of the notebooks that this system descends from. Of their own split, which is not known."""

_OF_IMAGES: dict[Task, tuple[str, ...]] = {
    "binary": ("roc_auc", "pr_auc", "recall", "specificity", "macro_f1", "brier", "ece"),
    "subtype": ("micro_f1", "macro_f1", "balanced_accuracy", "roc_auc_ovr", "brier", "ece"),
}
_OF_PATIENTS: dict[Task, tuple[str, ...]] = {
    "binary": ("patient_roc_auc", "patient_recall", "patient_specificity", "patient_recognition_rate"),
    "subtype": ("patient_accuracy", "patient_macro_f1", "patient_recognition_rate"),
}
NEVER_FOUND = "classes_never_found"
"""How many of the classes that are there have a recall of zero."""


class Figure(NamedTuple):
    """One number of the table."""

    value: float
    """Mean over seeds, and over folds where there are any."""
    low: float | None
    high: float | None
    """Ends of the 95% interval by patients; over folds, a standard deviation to both sides."""


class Row(NamedTuple):
    """One line of the table."""

    protocol: str
    task: Task
    level: str
    metric: str
    notebooks: float | None
    presets: dict[str, Figure]
    difference: Figure | None
    """Of the last preset from the first, paired by patient."""

    def to_json(self) -> Json:
        """For reproduction.json."""
        figures = {name: figure._asdict() for name, figure in self.presets.items()}
        return {**self._asdict(), "presets": figures, "difference": self.difference and self.difference._asdict()}


class PresetMetrics(NamedTuple):
    """One preset's metrics on one trial, means over its seeds."""

    values: dict[str, float]
    draws: dict[str, Draws]
    """Under each draw of patients; the same draws for whatever was scored on the same patients."""


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
    """Train each preset under each protocol with each seed, and write one table of the test sides' figures.

    Args:
        training_set: whose sources' published versions are taken.
        protocols: see :func:`ml.data.protocols.make_protocol_splits`.
        presets: the last is compared with the first.
        seeds: how many trainings each; the sides stay the same.
        output: a folder, made if need be: table.md, table.csv, reproduction.json, comparison.png and trainings/.
        store: where everything lies.
        settings: weights, backend, MLflow.
        weights_id: weights in the store, rather than those that the settings name.

    Returns:
        ``{dataset, presets, protocols, seeds, trainings, trained, output, run_id, rows}``; ``trained`` counts those
        that were not in the folder already.

    Raises:
        DataError: a source has no published version, or a protocol does not fit the data.
        ConfigError: nothing is asked for, or the folder cannot be written.
    """
    if not (presets and protocols and seeds):
        raise ConfigError("nothing to compare: name at least one preset, one protocol and one seed")
    try:
        (output / "trainings").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None
    dataset = assemble_dataset(training_set, store, settings)["dataset"]
    split = split_dataset(dataset, store)["split"]
    remove_abandoned(store)
    rows: list[Row] = []
    count = trained = 0
    kinds: set[Weights] = set()
    draws = max(preset.bootstrap_draws for preset in presets)  # the same for all, or nothing could be paired
    for protocol in protocols:
        for task in TASKS:
            measured: dict[str, list[PresetMetrics]] = {preset.name: [] for preset in presets}
            for trial in make_protocol_splits(protocol, task, dataset, store):
                for preset in presets:
                    with prepare_training_data(task, dataset, trial.split, preset, store, settings, weights_id) as data:
                        kinds.add(data.weights)
                        mine = []
                        for seed in range(seeds):
                            scores, new = _scored(trial, task, preset, seed, data, output / "trainings", store)
                            mine.append(scores)
                            count, trained = count + 1, trained + new
                    measured[preset.name].append(compute_metrics(mine, draws))
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
    run_id = _log(facts, output, settings)
    return {**facts, "trained": trained, "output": str(output), "run_id": run_id}


def _scored(
    trial: ProtocolSplit, task: Task, preset: Preset, seed: int, data: TrainingData, folder: Path, store: Store
) -> tuple[LabelledPredictions, bool]:
    """The test side's scores, and whether they had to be made."""
    name = f"{trial.name} {task} {preset.name} seed {seed}"
    file, test = folder / f"{name.replace(' ', '-')}.npz", data.rows_by_side["test"]
    job = digest(["reproduction", data.inputs_digest, seed])
    kept = _read(file, job)
    if kept is None:
        wait_for_concurrent_training(store, job)
        kept = _read(file, job)  # of whoever was waited for
    if kept is None:
        checkpoint, begin = Checkpoint(store, job), time.monotonic()
        with checkpoint.alive():
            learnt = fit_and_calibrate(task, preset.recipe(task), seed, data, checkpoint, store)
            scores = collect_scores(task, learnt, data)["test"]
            rule = learnt.choice.rule
            _keep(file, job, scores.probabilities, rule)
            checkpoint.forget()
        say(f"{name}: trained in {time.monotonic() - begin:.0f} s")
        return scores, True
    say(f"{name}: is in {folder} already")
    return LabelledPredictions(task, data.rows.iloc[test], data.truth[test], *kept), False


def _keep(file: Path, job: str, probabilities: NDArray[np.float64], rule: DecisionRule) -> None:
    whole = io.BytesIO()
    np.savez(whole, job=np.array(job), probabilities=probabilities, rule=np.array(json.dumps(rule.to_json())))
    scratch = file.with_suffix(".partial")
    scratch.write_bytes(whole.getvalue())
    scratch.replace(file)


def _read(file: Path, job: str) -> tuple[NDArray[np.float64], DecisionRule] | None:
    """What was kept of this very training; of one with other inputs, nothing."""
    if not file.is_file():
        return None
    with np.load(file) as kept:
        if str(kept["job"]) != job:
            return None
        return kept["probabilities"], DecisionRule.from_json(json.loads(str(kept["rule"])))


def compute_metrics(scores: Sequence[LabelledPredictions], draws: int) -> PresetMetrics:
    """Means of each metric over several models' scores of the same images, and the same under draws of patients."""
    one = np.ones((1, len(scores[0].truth)))
    values = {name: float(value[0]) for name, value in _means(scores, one).items() if np.isfinite(value[0])}
    present = np.unique(scores[0].truth)
    never = [sum(not (s.predicted[s.truth == k] == k).any() for k in present) for s in scores]
    values[NEVER_FOUND] = float(np.mean(never))
    drawn: dict[str, list[Draws]] = {}
    if draws and has_resampling_variance(scores[0]):
        for weights in bootstrap_weights(scores[0], draws, 0):
            for name, value in _means(scores, weights).items():
                drawn.setdefault(name, []).append(value)
    for magnification in MAGNIFICATIONS:
        mine = (scores[0].rows["magnification"] == magnification).to_numpy()
        if mine.any():
            parts = [s.subset(mine) for s in scores]
            rate = _means(parts, np.ones((1, int(mine.sum()))))["patient_recognition_rate"]
            values[f"patient_recognition_rate_{magnification}x"] = float(rate[0])
    return PresetMetrics(values, {name: np.concatenate(parts) for name, parts in drawn.items()})


def _means(scores: Sequence[LabelledPredictions], weights: Draws) -> dict[str, Draws]:
    found = [compute_weighted_metrics(one, weights) for one in scores]
    return {name: np.mean([of[name] for of in found], axis=0) for name in found[0]}


def compute_rows(protocol: str, task: Task, measured: Mapping[str, Sequence[PresetMetrics]]) -> Iterator[Row]:
    """The rows of one protocol and task.

    Args:
        protocol: its name.
        task: whose models.
        measured: preset -> what it reached on each trial, the same trials for all.
    """
    folds = len(next(iter(measured.values())))
    names = {"image": (*_OF_IMAGES[task], NEVER_FOUND), "patient": _OF_PATIENTS[task]}
    if folds > 1:  # as those who publish under this protocol tell it
        names["patient"] += tuple(f"patient_recognition_rate_{m}x" for m in MAGNIFICATIONS)
    first, *_, last = [*measured, *measured]
    for level, metrics in names.items():
        for metric in metrics:
            if any(metric not in one.values for mine in measured.values() for one in mine):
                continue
            figures = {preset: _figure(mine, metric) for preset, mine in measured.items()}
            difference = _difference(measured[first], measured[last], metric) if first != last else None
            yield Row(protocol, task, level, metric, NOTEBOOKS[task].get(metric), figures, difference)


def _figure(trials: Sequence[PresetMetrics], metric: str) -> Figure:
    if len(trials) > 1:
        return _over_folds([one.values[metric] for one in trials])
    return _with_ends(trials[0].values[metric], trials[0].draws.get(metric))


def _difference(first: Sequence[PresetMetrics], last: Sequence[PresetMetrics], metric: str) -> Figure:
    if len(first) > 1:
        return _over_folds([b.values[metric] - a.values[metric] for a, b in zip(first, last, strict=True)])
    a, b = first[0], last[0]
    paired = b.draws[metric] - a.draws[metric] if metric in a.draws and len(a.draws[metric]) else None
    return _with_ends(b.values[metric] - a.values[metric], paired)


def _over_folds(values: Sequence[float]) -> Figure:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    return Figure(mean, mean - spread, mean + spread)


def _with_ends(value: float, draws: Draws | None) -> Figure:
    ends, _ = (None, "") if draws is None else confidence_interval(draws)
    return Figure(value, *(ends or (None, None)))


def cells(row: Json) -> list[str]:
    """A row for people: metric, the notebooks' figure, each preset's with its interval, and the difference."""

    def told(figure: Json | None, sign: str = "") -> str:
        if figure is None:
            return ""
        ends = f" [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]" if figure["low"] is not None else ""
        return f"{figure['value']:{sign}.3f}{ends}"

    notebooks = f"{row['notebooks']:.3f}" if row["notebooks"] is not None else ""
    return [row["metric"], notebooks, *map(told, row["presets"].values()), told(row["difference"], "+")]


def column_headings(facts: Json) -> list[str]:
    """What stands above :func:`cells`."""
    presets = facts["presets"]
    return ["metric", "notebooks", *presets, f"{presets[-1]} - {presets[0]}" if len(presets) > 1 else "difference"]


def table_notes(facts: Json) -> list[str]:
    """What has to be known to read the table."""
    told = [
        f"Data set {facts['dataset']} of the training set {facts['set']}; test sides; means over {facts['seeds']} "
        "seed(s), with 95% intervals by draws of patients. The difference is paired: by the same draws. Where every "
        "draw gives the same there is no interval.",
        "The notebooks' figures are of their own split, which is not known; they have no intervals.",
        "notebooks and spanhol split by slide, as published work does: slides of one patient may lie on two sides.",
    ]
    if "spanhol" in facts["protocols"]:
        told.append(
            "spanhol: mean over the five folds, with one standard deviation to both sides; one model for all "
            "magnifications, where the authors trained one for each."
        )
    if _random(facts):
        told.append(_OF_RANDOM_WEIGHTS)
    return told


_OF_RANDOM_WEIGHTS = "RANDOM BACKBONE WEIGHTS: these figures say nothing of what either recipe reaches with ImageNet's."


def _random(facts: Json) -> bool:
    return "random" in facts["weights"].values()


def format_tables(facts: Json) -> Iterator[tuple[str, list[list[str]]]]:
    """The table in parts, for people: title and lines of :func:`cells`."""
    for (protocol, task, level), part in groupby(facts["rows"], key=itemgetter("protocol", "task", "level")):
        yield f"{protocol}, {task}, by {level}", [cells(row) for row in part]


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
    title = f"{facts['set']}: means over {facts['seeds']} seed(s); the intervals are told in table.md"
    if _random(facts):
        title += f"\n{_OF_RANDOM_WEIGHTS}"
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
