"""The kinds of input that lie in the store: JSON of every place in it, damaged or of another type."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import yaml

from ml.cli.sources import _describe_source
from ml.core import leases
from ml.core.leases import hold_lease, mark_beat
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.manifest import make_manifest
from ml.data.source_versions import publish_manifest
from ml.data.sources import fetch_source, load_source
from ml.data.splits import read_split, split_dataset
from ml.data.training_sets import assemble_dataset, load_training_set
from ml.data.validation import validate_manifest
from ml.images.file_facts import PictureFactsCache
from ml.images.pixel_cache import PixelCache
from ml.operation.erasure import _PatientData, _put_on_list
from ml.training import checkpoints
from ml.training.backbone_weights import look_up_weights
from ml.training.checkpoints import Checkpoint, wait_for_concurrent_training
from tests.fuzz.mutation import dump_json, mutate_json
from tests.helpers.made_up import every_class, name, png

_JOB = "0" * 64


class StoredFiles(NamedTuple):
    """A store with a file of each place, and what reads them."""

    template: Path
    folder: Path
    keys: list[str]
    """Keys of the files that are mutated."""
    readers: list[Callable[[], object]]


def prepare_files(scratch: Path) -> StoredFiles:
    """Returns a store in which a source was ingested, assembled and split, with a lease and a checkpoint."""
    conf, pictures = scratch / "conf", scratch / "pictures"
    for folder in (conf / "sources", conf / "training_sets", pictures):
        folder.mkdir(parents=True)
    for number, (case, (subtype, _)) in enumerate(every_class(cases_per_class=3).items()):
        (pictures / name(subtype, case)).write_bytes(png(number, (40, 30)))
    source = {"name": "made", "kind": "directory", "path": str(pictures), "cohort": "made"}
    (conf / "sources" / "made.yaml").write_text(yaml.safe_dump(source))
    training_set = {"name": "made", "sources": ["made"], "ledger": "made", "policy": "demo", "preset": "demo"}
    (conf / "training_sets" / "made.yaml").write_text(yaml.safe_dump(training_set))
    template = scratch / "template"
    with contextlib.redirect_stderr(io.StringIO()):
        ids = _fill(Settings(home=scratch / "home", store=template.as_uri(), conf=conf, workers=1))
    keys = sorted(path.relative_to(template).as_posix() for path in template.rglob("*.json"))
    work = scratch / "store"
    settings = Settings(home=scratch / "home", store=work.as_uri(), conf=conf, workers=1)
    # Whoever holds a lease or trains is dead soon.
    patch.multiple(leases, _SECONDS_UNTIL_EXPIRED=0.02, _SECONDS_BETWEEN_ATTEMPTS=0.01).start()
    patch.multiple(checkpoints, _SECONDS_UNTIL_DEAD=0.02, _SECONDS_BETWEEN_CHECKS=0.01).start()
    readers = _list_readers(ids, settings)
    return StoredFiles(
        template,
        work,
        [key for key in keys if key.split("/")[0] not in {"ledgers", "tmp"} and "/docs/" not in key],
        readers,
    )


def use_file(stored: StoredFiles, rng: random.Random) -> None:
    """Mutates one file, and has half of what reads the store do so."""
    shutil.rmtree(stored.folder, ignore_errors=True)
    shutil.copytree(stored.template, stored.folder, copy_function=os.link)  # the store never writes into a file
    file = stored.folder / rng.choice(stored.keys)
    data = dump_json(mutate_json(json.loads(file.read_bytes()), rng), rng)
    file.unlink()
    file.write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()):
        for read in rng.sample(stored.readers, len(stored.readers) // 2):
            read()


def _fill(settings: Settings) -> Json:
    store = Store(settings.store)
    spec, training_set = load_source("made", settings.conf), load_training_set("made", settings.conf)
    fetch_source(spec, store, settings)
    manifest = make_manifest(spec, store, 0)["manifest"]
    publish_manifest(manifest, store)
    dataset = assemble_dataset(training_set, store, settings)["dataset"]
    weights = store.create("weights", ["random", "0"], {"kind": "random", "sha256": "0", "from": "random"})
    PixelCache(store).fill(_read_rows(dataset, store), 0)
    store.compare_and_set("jobs/leases/made.json", mark_beat({"owner": "x"}, released=True), None)
    part: Json = {
        "part": "fold 1",
        "epoch": 2,
        "history": {"loss": [0.5, 0.4]},
        "arrays": f"jobs/training/{_JOB}/a.npz",
    }
    state: Json = {"run_id": "r", "current": part, "finished": {"fold 0": part}, "owner": "x", "touched": 0.0}
    store.compare_and_set(f"jobs/training/{_JOB}/state.json", mark_beat(state, released=True), None)
    erased = {"nobody": {"why": "request 7", "when": "2026-01-01", "datasets": [], "slides": []}}
    store.compare_and_set("refs/erased/made.json", erased, None)
    return {
        "manifest": manifest,
        "dataset": dataset,
        "split": split_dataset(dataset, store)["split"],
        "weights": weights,
    }


def _read_rows(dataset: str, store: Store) -> Any:
    from ml.data.training_sets import read_dataset

    return read_dataset(dataset, store)


def _list_readers(ids: Json, settings: Settings) -> list[Callable[[], object]]:
    store, conf = Store(settings.store), settings.conf
    spec, training_set = load_source("made", conf), load_training_set("made", conf)

    def take_lease() -> None:
        with hold_lease(store, "made", timeout=0.1):
            pass

    def resume() -> None:
        wait_for_concurrent_training(store, _JOB)
        checkpoint = Checkpoint(store, _JOB)
        assert checkpoint.run_id is None or checkpoint.progress
        checkpoint.forget()

    def describe() -> None:
        with patch("ml.cli.sources.read_settings", lambda: settings):
            _describe_source(conf / "sources" / "made.yaml", store)

    return [
        lambda: fetch_source(spec, store, settings),
        lambda: make_manifest(spec, store, 0),
        lambda: validate_manifest(ids["manifest"], store),
        lambda: publish_manifest(ids["manifest"], store),
        lambda: assemble_dataset(training_set, store, settings),
        lambda: split_dataset(ids["dataset"], store),
        lambda: read_split(ids["split"], store),
        lambda: look_up_weights(ids["weights"], store),
        lambda: PictureFactsCache(store).read(),
        lambda: PixelCache(store).index(),
        lambda: _put_on_list("nobody", "made", "request 8", _PatientData(), store),
        take_lease,
        resume,
        describe,
    ]
