"""``breakhis predict`` as a person uses it: files and folders in, a row an image out, bad images among good ones."""

import io
import json
import struct
import tracemalloc
import zlib
from contextlib import ExitStack, nullcontext

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ml.core import progress
from ml.registry import version_scoring
from tests.helpers import pictures
from tests.helpers.made_up import png, write_tree
from tests.helpers.served_models import encoded, logged  # noqa: F401  # a fixture: tiny models in an MLflow of their own

pytestmark = pytest.mark.integration

COLOUR = Image.new("RGB", (50, 50), (200, 100, 150))


@pytest.fixture(scope="module")
def kept_processes():
    """A process of each model that is used, kept for the next test: starting one takes many seconds."""
    with ExitStack() as stack:
        processes = {}

        start = version_scoring.ModelProcess

        def keep(folder, name):
            if name not in processes:
                processes[name] = stack.enter_context(start(folder, name))
            return nullcontext(processes[name])

        yield keep


@pytest.fixture
def predict(logged, tmp_path, monkeypatch, command, kept_processes):  # noqa: F811
    """Runs the command on a model; returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(version_scoring, "ModelProcess", kept_processes)
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", logged["settings"].mlflow_uri)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, model="binary"):
        return command("predict", "--model", logged.get(model, model), *arguments)

    return run


def bomb(side: int = 20_000) -> bytes:
    """A PNG whose header promises RGB of ``side`` x ``side``, and whose data begin as such a picture's would."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(20 * (1 + 3 * side)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def rows(out):
    return json.loads(out)["predictions"]


def test_files_and_folders_come_in_order_with_a_row_each(predict, tmp_path, logged):  # noqa: F811
    folder = write_tree(
        tmp_path / "pictures", {"b.png": png(1), "deep/a.png": png(2), "notes.txt": b"x", "__MACOSX/b.png": png(3)}
    )
    (tmp_path / "one.jpg").write_bytes(encoded(COLOUR, "JPEG"))
    code, out, err = predict(tmp_path / "one.jpg", folder, "--json", model="registered")
    assert code == 0, err
    assert json.loads(out)["model"] == logged["registered"]
    names = [tmp_path / "one.jpg", folder / "b.png", folder / "deep" / "a.png"]
    assert [row["image"] for row in rows(out)] == list(map(str, names))
    import mlflow

    expected = mlflow.pyfunc.load_model(logged["registered"]).predict([str(name) for name in names])
    for row, expected_row in zip(rows(out), expected.to_dict("records"), strict=True):
        assert row["p_malignant"] == pytest.approx(expected_row["p_malignant"], abs=1e-6)
        assert (row["label"], row["threshold"], row["model_version"]) == (expected_row["label"], 0.3, "made-binary/1")
    assert "classifying: 3 in " in err


def test_for_people_it_is_a_table(predict, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    code, out, err = predict(tmp_path / "a.png", model="subtype")
    assert code == 0, err
    for word in ("image", "label", "p_DC", "p_PC", str(tmp_path / "a.png"), "PC"):
        assert word in out


def test_progress_is_told_while_it_works(predict, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    folder = write_tree(tmp_path / "pictures", {f"{k}.png": png(k) for k in range(3)})
    _, out, err = predict(folder, "--json")
    assert "classifying: 1 of 3 (" in err
    assert "classifying: 3 of 3 (" in err
    assert len(out.splitlines()) == 1  # progress is not among the results


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_table_is_written(predict, tmp_path, suffix):
    folder = write_tree(tmp_path / "pictures", {"a.png": png(1), "b.png": b"text", "c.png": png(2)})
    file = tmp_path / f"table.{suffix}"
    code, out, _ = predict(folder, "--output", file)
    assert (code, out) == (3, "")
    table = pd.read_csv(file) if suffix == "csv" else pd.read_parquet(file)
    assert [name.rsplit("/")[-1] for name in table["image"]] == ["a.png", "b.png", "c.png"]
    assert table["p_malignant"].notna().tolist() == [True, False, True]
    assert table["error"].notna().tolist() == [False, True, False]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    also = rows(predict(folder, "--json", "--output", file)[1])
    assert [row["image"] for row in also] == table["image"].tolist()


BAD = {
    "1x1": (encoded(COLOUR.resize((1, 1))), "size: {}: 1x1 pixels; a side has 8 at the least"),
    "16-bit": (encoded(Image.fromarray(np.zeros((50, 50), np.uint16))), "mode: {}: pixel format I;16"),
    "greyscale": (png(mode="L"), "mode: {}: greyscale"),
    "16-bit colour": (
        pictures.png(np.full((50, 50, 3), (300, 200, 100), np.uint16)),
        "mode: {}: 16 bits a channel, and nothing says how to scale them to 8",
    ),
    "transparent": (
        pictures.png(pictures.with_alpha(np.full((50, 50, 3), (200, 100, 150), np.uint8), np.eye(50) * 255)),
        "mode: {}: 2,450 of 2,500 pixels are transparent",
    ),
    "grey as RGB": (encoded(COLOUR.convert("L").convert("RGB")), "mode: {}: greyscale, stored as RGB"),
    "cmyk": (encoded(COLOUR.convert("CMYK"), "JPEG"), "mode: {}: pixel format CMYK"),
    "huge": (bomb(), "size: {}: too many pixels; at most 100,000,000 are read"),
    "large": (bomb(11_000), "size: {}: 11000x11000 pixels; at most 100,000,000 are read"),
    "text": (b"to be delivered", "undecodable: {}: not an image file"),
    "empty": (b"", "undecodable: {}: not an image file"),
    "cut": (png(size=(200, 200))[:-2000], "truncated: {}: "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_has_a_row_with_its_reason_and_the_others_are_classified(predict, tmp_path, kind):
    data, reason = BAD[kind]
    folder = write_tree(tmp_path / "pictures", {"1.png": png(1), "2.png": data, "3.png": png(2)})
    code, out, err = predict(folder, "--json")
    assert code == 3
    before, bad, after = rows(out)
    expected = reason.format(folder / "2.png")
    assert (bad["image"], bad.keys()) == (str(folder / "2.png"), {"image", "error"})
    assert bad["error"].startswith(expected)
    assert before["label"]
    assert after["label"]
    assert err.splitlines()[-1].startswith(f"error: 1 of 3 images cannot be classified; first: {expected}")


def test_transparency_is_taken_as_the_picture_under_it(predict, tmp_path):
    seen = COLOUR.convert("RGBA")
    folder = write_tree(tmp_path / "pictures", {"a.png": encoded(COLOUR), "b.png": encoded(seen)})
    code, out, err = predict(folder, "--json")
    assert code == 0, err
    a, b = rows(out)
    assert a["p_malignant"] == b["p_malignant"]


def test_deeper_pictures_are_refused_or_scaled_by_the_declared_bits(predict, tmp_path):
    samples = np.random.default_rng(0).integers(0, 4096, (46, 70, 3), dtype=np.uint16)
    eight = np.rint(samples * 255.0 / 4095).astype(np.uint8)
    files = {"a.png": pictures.png(samples), "b.tif": pictures.planar_tiff(samples), "c.png": pictures.png(eight)}
    folder = write_tree(tmp_path / "pictures", files)
    code, out, _ = predict(folder, "--json")
    assert code == 3
    assert ["error" in row for row in rows(out)] == [True, True, False]
    assert rows(out)[1]["error"].startswith(f"mode: {folder / 'b.tif'}: 16 bits a channel")
    code, out, err = predict(folder, "--json", "--significant-bits", 12)
    assert code == 0, err
    assert len({row["p_malignant"] for row in rows(out)}) == 1
    code, out, _ = predict(folder, "--json", "--significant-bits", 10)
    assert ["error" in row for row in rows(out)] == [True, True, False]


def test_nothing_usable_exits_3(predict, tmp_path):
    folder = write_tree(tmp_path / "pictures", {"1.png": b"text", "2.png": png(mode="L")})
    code, out, err = predict(folder, tmp_path / "gone.png", "--json")
    assert code == 3
    assert [row["error"].split(":")[0] for row in rows(out)] == ["undecodable", "mode", "unreadable"]
    assert "error: 3 of 3 images cannot be classified" in err
    table = predict(folder)[1]
    assert table.count("greyscale") == 1


def test_what_cannot_be_begun_is_one_line(predict, tmp_path, logged):  # noqa: F811
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "empty").mkdir()
    for arguments, model, message in (
        ([tmp_path / "empty"], "binary", "empty: no image files in this folder"),
        ([tmp_path / "a.png", "--output", tmp_path / "table.txt"], "binary", "expected a name that ends in .csv or"),
        ([tmp_path / "a.png", "--output", tmp_path / "no" / "t.csv"], "binary", "t.csv: there is no folder"),
        ([tmp_path / "a.png"], "models:/made-binary/77", "models:/made-binary/77 cannot be loaded from MLflow: "),
    ):
        code, out, err = predict(*arguments, model=model)
        assert (code, out) == (3, "")
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err.splitlines()[-1]


def test_large_pictures_are_not_held_together(predict, tmp_path):
    """Ten of 12 MB: memory of about two is needed, as each is let go once it is seen to be whole."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000), (200, 100, 150)).save(buffer, "PNG", compress_level=1)
    folder = write_tree(tmp_path / "pictures", {f"{k}.png": buffer.getvalue() for k in range(10)})
    tracemalloc.start()
    try:
        code, _, err = predict(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == 0, err
    assert peak < 50 * 2**20


def test_a_picture_that_takes_too_long_is_named_with_the_limit(predict, tmp_path, monkeypatch):
    monkeypatch.setenv("BREAKHIS_DECODING_SECONDS", "1")
    folder = write_tree(tmp_path / "pictures", {"1.png": png(1), "2.bmp": pictures.slow_bmp(4_000), "3.png": png(2)})
    code, out, err = predict(folder, "--json")
    assert code == 3
    before, slow, after = rows(out)
    assert (before["label"], after["label"]) == ("malignant", "malignant")
    expected = f"time: {folder / '2.bmp'}: reading it takes more than 1 s of a core, "
    assert slow["error"].startswith(expected)
    last = err.splitlines()[-1]
    assert last.startswith(f"error: 1 of 3 images cannot be classified; first: {expected}")
    assert last.endswith("or raise BREAKHIS_DECODING_SECONDS")
