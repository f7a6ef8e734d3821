"""Writes a small store and an MLflow as commit f535279 made them, for tests of whatever comes after it.

Run it in a checkout of f535279, from its root, with its own environment:

    PYTHONPATH=. .venv/bin/python write_store.py /old-home old_store.tar.xz

The first argument is a folder that is made, the second the archive that everything is packed into at the end. MLflow's
database holds the folder's name, so choose one that is found again, as /old-home; old_store.py puts another in its
place. The folder becomes the home of f535279's breakhis:

    conf/            a source "drawn" of 32 drawn pictures, a training set "old", a policy "lenient"
    backbone.keras   weights for BREAKHIS_WEIGHTS
    store/           the store
    mlflow.db        MLflow's database, and mlartifacts/ beside it
    secrets.json     the key of the audit log
    expected.json    what f535279 says of all this

Every stage is f535279's own. Four things around them stand in for real ones, so that all of it fits into a repository:
the backbone's weights and the first weights of a head are mostly zero, the report's pictures have few pixels, and
Airflow's answers are given here.
"""

import contextlib
import io
import json
import lzma
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

AUDIT_KEY = "the-audit-key-of-a-test-fixture-and-of-nothing-else"
DAG_RUN = "manual__2026-01-01T00:00:00+00:00"
REVIEW_RUN = "old-binary-v1"

SOURCE = """\
name: drawn
kind: directory
description: Drawn pictures, coarse and few.
path: ../pictures
cohort: drawn
"""
TRAINING_SET = """\
name: old
description: Written by f535279.
sources: [drawn]
ledger: old
policy: lenient
preset: demo
schedule: null
"""
POLICY = """\
name: lenient
description: Passes whatever was trained.
binary: {roc_auc: 0, macro_f1: 0}
subtype: {roc_auc_ovr: 0, macro_f1: 0}
zero_recall: allow
absent_classes: allow
"""

LIVE_CHANNELS, LIVE_FEATURES, LIVE_UNITS = 8, 32, 16
CASES = 4  # of each subtype


def main() -> None:
    """Make the folder, run f535279's stages in it, ask it what it says, and pack all of it."""
    home, archive = Path(sys.argv[1]), Path(sys.argv[2])
    home.mkdir()
    os.environ |= {
        "BREAKHIS_HOME": str(home),
        "BREAKHIS_CONF": str(home / "conf"),
        "BREAKHIS_WEIGHTS": str(home / "backbone.keras"),
        "BREAKHIS_BACKEND": "openvino",
        "BREAKHIS_WORKERS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    (home / "secrets.json").write_text(json.dumps({"audit": AUDIT_KEY}))
    pictures = write_conf(home / "conf")
    make_backbone(pictures).save(home / "backbone.keras")
    with stand_ins() as airflow:
        expected = run_stages(airflow)
    shown = [pictures[0], pictures[15], pictures[31]]
    expected |= {"prefix": str(home), "commit": "f535279", "predictions": predict(shown, home)}
    expected["audit_verify"] = alone("audit", "verify")
    expected["history"] = alone("history", "old-binary")
    expected["aliases"] = aliases()
    (home / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    tidy(home)
    pack(home, archive)
    shutil.copyfile(home / "expected.json", archive.with_name("expected.json"))
    print(f"{archive}: {archive.stat().st_size:,} bytes")


# --- what is put in ---------------------------------------------------------------------------------------------------


def write_conf(conf: Path) -> list[Path]:
    """The YAML that users write, and the pictures of the source; returns these."""
    from ml.sources.demo import draw
    from ml.taxonomy import MAGNIFICATIONS, SUBTYPES, ImageName, label_of
    from PIL import Image

    for name, text in {
        "sources/drawn.yaml": SOURCE,
        "training_sets/old.yaml": TRAINING_SET,
        "policies/lenient.yaml": POLICY,
    }.items():
        (conf / name).parent.mkdir(parents=True)
        (conf / name).write_text(text)
    (conf / "pictures").mkdir()
    files = []
    for k, subtype in enumerate(SUBTYPES):
        for case in range(CASES):
            name = ImageName(subtype, f"14-{1000 + 10 * k + case}", MAGNIFICATIONS[case], 1, label_of(subtype))
            # Squares of 16 pixels at the network's own size: nothing is interpolated, so the cached pixels pack well.
            coarse = Image.fromarray(draw(name, 1)).resize((14, 14), Image.Resampling.BOX)
            # The malignant ones as negatives: else there is too little in so few and so coarse pictures to be learnt.
            coarse = coarse.point(lambda value: 255 - value) if name.label == "malignant" else coarse
            file = conf / "pictures" / str(name)
            coarse.resize((224, 224), Image.Resampling.NEAREST).save(file, optimize=True)
            files.append(file)
    return files


def make_backbone(pictures: list[Path]):
    """EfficientNetB0 in which only a few channels of each layer pass anything on, with weights of few values.

    As ``ml.models._random`` does it, the statistics of BatchNormalization are those of the pictures, so that the
    features differ from picture to picture.
    """
    import keras
    import numpy as np
    import tensorflow as tf
    from ml.models import _empty
    from PIL import Image

    backbone, random = _empty(), np.random.default_rng(0)
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Conv2D):
            live = LIVE_FEATURES if layer.name == "top_conv" else LIVE_CHANNELS
            kernel = np.zeros(layer.kernel.shape, np.float32)
            part = kernel[:, :, :LIVE_CHANNELS, :live]
            part[:] = random.choice([-1.0, -0.5, 0.5, 1.0], part.shape)
            layer.kernel.assign(kernel)
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            kernel = np.zeros(layer.kernel.shape, np.float32)
            part = kernel[:, :, :LIVE_CHANNELS]
            part[:] = random.choice([-1.0, -0.5, 0.5, 1.0], part.shape)
            layer.kernel.assign(kernel)
    norms = [layer for layer in backbone.layers if isinstance(layer, keras.layers.BatchNormalization)]
    usual = [layer.momentum for layer in norms]
    for layer in norms[:-1]:
        layer.gamma.assign(np.full(layer.gamma.shape, 0.125))
    for layer in norms:
        layer.momentum = 0.0
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in pictures]).astype(np.float32)
    tf.function(backbone)(pixels, training=True)
    for layer, momentum in zip(norms, usual, strict=True):
        layer.momentum = momentum
        for variable in (layer.moving_mean, layer.moving_variance):
            variable.assign(_short(np.asarray(variable)))
    return backbone


def _short(values):
    """The same float32 numbers to seven binary digits."""
    import numpy as np

    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@contextlib.contextmanager
def stand_ins():
    """Stand in for Airflow, and keep small what would be megabytes of random numbers and of pictures."""
    from types import SimpleNamespace
    from unittest.mock import patch

    import numpy as np
    from ml.airflow_api import AirflowApi
    from ml.errors import AirflowError

    from ml import figures, fitting

    # A hidden unit without weights stays without, and so does a weight of a feature that never varies: what is learnt
    # is learnt by the others. All weights are rounded, so those that do not change have one of few values.
    build = fitting.build_head

    def build_sparse(*given, **options):
        head = build(*given, **options)
        hidden, logits = head.get_layer("hidden"), head.get_layer("logits")
        kernel = np.round(np.asarray(hidden.kernel) * 32) / 32
        kernel[:, LIVE_UNITS:] = 0
        kernel[LIVE_FEATURES:] = 0
        hidden.kernel.assign(kernel)
        kernel = np.round(np.asarray(logits.kernel) * 16) / 16
        kernel[LIVE_UNITS:] = 0
        logits.kernel.assign(kernel)
        return head

    # Airflow's record: the same as tests/test_promotion.py makes, of one review in which the reviewer has approved.
    record = SimpleNamespace(run={}, detail={})

    def run_of(*_):
        return record.run

    def detail(*asked):
        task = asked[-1]
        if task != "review":
            raise AirflowError(f"no {task}", status=404)
        return record.detail

    with (
        patch.object(fitting, "build_head", build_sparse),
        patch.object(figures, "_save", lambda figure, path: figure.savefig(path, dpi=8)),
        patch.object(AirflowApi, "dag_run", run_of),
        patch.object(AirflowApi, "hitl_detail", detail),
    ):
        yield record


# --- what f535279 makes of it -----------------------------------------------------------------------------------------


def run_stages(airflow) -> dict:
    """The whole workflow, as the DAGs wire it; returns every stage's JSON."""
    told = {"ingest": stage("ingest", "drawn"), "assemble": stage("assemble", "old")}
    dataset = told["assemble"]["dataset"]
    told["split"] = stage("split", dataset)
    split = told["split"]["split"]
    told["weights"] = stage("weights", "--preset", "demo")
    told["features"] = stage("features", dataset, "--preset", "demo")
    # So that the runs say which run of a DAG they were trained in, as in Airflow.
    os.environ |= {"BREAKHIS_DAG": "retrain_old", "BREAKHIS_DAG_RUN": DAG_RUN}
    for task in ("binary", "subtype"):
        told[f"train_{task}"] = stage("train", task, "--dataset", dataset, "--split", split, "--preset", "demo")
    del os.environ["BREAKHIS_DAG"], os.environ["BREAKHIS_DAG_RUN"]
    for task in ("binary", "subtype"):
        told[f"register_{task}"] = stage("register", told[f"train_{task}"]["run_id"])
        told[f"gate_{task}"] = stage("gate", f"old-{task}", "1")
    evidence = told["register_binary"]["evidence"]
    airflow.run = {
        "conf": {"model": "old-binary", "version": "1", "evidence": evidence},
        "triggering_user_name": "engineer",
    }
    airflow.detail = {
        "response_received": True,
        "responded_by_user": {"id": "7", "name": "reviewer"},
        "chosen_options": ["Approve"],
        "params_input": {"reason": "looks right"},
        "body": told["gate_binary"]["review"],
        "responded_at": "2026-01-01T00:00:00Z",
    }
    service = {"BREAKHIS_AIRFLOW_URL": "http://localhost:1", "BREAKHIS_AIRFLOW_USER": "service"}
    os.environ |= service
    told["promote_binary"] = stage("promote", "old-binary", "1", "--dag-run", REVIEW_RUN, "--evidence", evidence)
    for name in service:
        del os.environ[name]
    return told


def stage(*arguments: str) -> dict:
    """Run a stage in this process, where the stand-ins are; returns its JSON."""
    from ml.cli import cli

    print("breakhis", *arguments, file=sys.stderr)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main([*arguments, "--json"], standalone_mode=False)
    return _told(out.getvalue())


def alone(*arguments: str) -> dict:
    """Run a command in a process of its own, without stand-ins; returns its JSON."""
    print("breakhis", *arguments, file=sys.stderr)
    command = [str(Path(sys.executable).with_name("breakhis")), *arguments, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return _told(done.stdout)


def _told(printed: str) -> dict:
    result = json.loads(printed.splitlines()[-1])
    result.pop("seconds", None)
    return result


def predict(files: list[Path], home: Path) -> dict:
    """What each version says of some pictures: by its address, rows with the picture's path below the home folder."""
    told = {}
    for model in ("models:/old-binary@champion", "models:/old-subtype/1"):
        rows = alone("predict", *map(str, files), "--model", model)["predictions"]
        told[model] = [{**row, "image": str(Path(row["image"]).relative_to(home))} for row in rows]
    return told


def aliases() -> dict:
    """The aliases of each registered model, as MLflow itself says them."""
    from ml.settings import settings
    from ml.tracking import connect

    models = connect(settings()).search_registered_models()
    return {one.name: {alias: int(number) for alias, number in one.aliases.items()} for one in models}


# --- packing ----------------------------------------------------------------------------------------------------------


def tidy(home: Path) -> None:
    """Leave out what is made anew by itself: the converted backbone, and locks and scratch folders of the store."""
    shutil.rmtree(home / "cache", ignore_errors=True)
    shutil.rmtree(home / "store" / "tmp", ignore_errors=True)
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database:
        database.execute("VACUUM")


def pack(home: Path, archive: Path) -> None:
    """All of it as one file, whose dictionary is as large as all of it: most files are there several times."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27}]
    with (
        lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        # Files of one name beside each other, such as a picture in MLflow and its copy in a bundle.
        files = sorted((p for p in home.rglob("*") if p.is_file()), key=lambda p: (p.suffix, p.name, str(p)))
        for file in files:
            tar.add(file, file.relative_to(home).as_posix(), recursive=False, filter=plain)


if __name__ == "__main__":
    main()
