"""Commands that are no stages: ``breakhis predict``, ``config`` and ``erase``."""

import json
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ml.cli.options import json_option, output_result
from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError, ImageError, RegistryError
from ml.core.messages import cut_text, hide_access
from ml.core.progress import track
from ml.core.settings import Settings, read_settings
from ml.core.store import Store
from ml.data.sources.files import is_image

if TYPE_CHECKING:
    from ml.registry.version_scoring import ModelProcess


@click.command()
@json_option
def config(as_json: bool) -> None:
    """Show every setting with its value; each can be set as an environment variable BREAKHIS_<NAME>."""
    values = read_settings().model_dump(mode="json")
    for name in ("airflow_url", "docker_mlflow_uri", "mlflow_ui", "mlflow_uri"):
        values[name] = hide_access(values[name])
    if as_json:
        output_result(values, as_json=True, result_uri=None)
        return
    for name, field in Settings.model_fields.items():
        click.echo(f"BREAKHIS_{name.upper()} = {values[name]}")
        click.echo(click.wrap_text(field.description or "", 100, initial_indent="    ", subsequent_indent="    "))


@click.command()
@click.argument("patient")
@click.option("--cohort", default="breakhis", show_default=True, help="Whose patient it is; see a source's YAML.")
@click.option("--why", required=True, help="The request, such as its reference; kept with the patient's name.")
@click.confirmation_option(prompt="The patient's rows, pixels and features cannot be brought back. Erase them?")
@json_option
def erase(patient: str, cohort: str, why: str, as_json: bool) -> None:
    """Erase PATIENT (a case number such as 14-22549, or COHORT:ID) from the store, and list trainings it took part in.

    The split ledgers keep the patient's side, and the next ingestion leaves the patient's images out. The source itself
    and what MLflow has of those trainings are left to you.
    """
    from ml.operation.erasure import erase_patient

    settings = read_settings()
    output_result(erase_patient(patient, cohort, why, Store(settings.store), settings), as_json, None)


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    metavar="URI",
    type=click.Path(),
    help="Such as models:/breakhis-binary@champion or runs:/ID/model.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the table to this .csv or .parquet file."
)
@click.option(
    "--significant-bits",
    type=click.IntRange(9, 16),
    metavar="N",
    help="How many of 16 bits a channel the camera fills, such as 12; without it such images are refused.",
)
@json_option
def predict(
    images: tuple[Path, ...], model: str, output: Path | None, significant_bits: int | None, as_json: bool
) -> None:
    """Classify IMAGES (files, or folders of them) and print a row an image.

    An image that cannot be read, or that no model of stained tissue can say anything about (greyscale, 16 bits,
    transparent, made for print, smaller than 8 pixels), gets a row with its error; the others are classified all the
    same, and the exit status is 3.
    """
    if output and output.suffix not in {".csv", ".parquet"}:
        raise BreakhisError(f"--output {output}: expected a name that ends in .csv or .parquet")
    if output and not output.parent.is_dir():
        raise BreakhisError(f"--output {output}: there is no folder {output.parent}")
    rows = list(_predict_rows(list(_find_image_files(images)), model, significant_bits))
    if output:
        _write_table(rows, output)
    if as_json:
        click.echo(json.dumps({"model": model, "predictions": rows}, sort_keys=True))
    elif not output:
        _print_table(rows)
    bad = [row for row in rows if "error" in row]
    if bad:
        raise BreakhisError(f"{len(bad)} of {len(rows)} images cannot be classified; first: {bad[0]['error']}")


def _write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """Writes the rows to a file, which is whole or not there."""
    import pandas as pd

    scratch = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    try:
        table = pd.DataFrame(rows)
        if output.suffix == ".csv":
            table.to_csv(scratch, index=False)
        else:
            table.to_parquet(scratch, index=False)
        scratch.replace(output)
    except OSError as error:
        raise explain_os_error(error, output.parent) or BreakhisError(
            f"--output {output}: cannot be written: {error.strerror or error}"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def _find_image_files(images: tuple[Path, ...]) -> Iterator[Path]:
    for image in images:
        if image.is_dir():
            found = (path for path in image.rglob("*") if is_image(path.relative_to(image).as_posix()))
            files = sorted(path for path in found if path.is_file())
            if not files:
                raise BreakhisError(f"{image}: no image files in this folder")
            yield from files
        else:
            yield image


def _predict_rows(files: list[Path], model: str, significant_bits: int | None) -> Iterator[dict[str, Any]]:
    from ml.core.mlflow_client import connect, fetch_artifacts, find_outage
    from ml.images.local_pictures import read_pictures
    from ml.registry.version_scoring import ModelProcess, batches

    settings = read_settings()
    connect(settings)
    import mlflow

    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        try:
            folder = fetch_artifacts(model, Path(scratch))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise find_outage(error) or RegistryError(
                f"{model} cannot be loaded from MLflow: {cut_text(hide_access(error))}{_suggest_model_uri(model)}"
            ) from None
        with ModelProcess(folder, model) as process:
            # Decoded here, since a model that an earlier release logged brings along a decoder that takes what it must
            # not.
            contents = read_pictures(
                track(files, total=len(files), what="classifying"),
                significant_bits,
                settings.decoding_bytes,
                settings.decoding_seconds,
            )
            for batch in batches(contents, _count_bytes):
                yield from _classify_batch(batch, process)


def _suggest_model_uri(uri: str) -> str:
    """Returns ``; did you mean …?`` for an address with a mistyped model; empty for a run's model."""
    from mlflow.exceptions import MlflowException

    from ml.core.mlflow_client import find_outage
    from ml.registry.registered_model import suggest_model

    registered = re.match(r"models:/+([^/@]+)", uri)
    try:
        return suggest_model(registered[1] if registered else uri, read_settings())
    except MlflowException as error:
        if outage := find_outage(error):
            raise outage from None
        return ""


def _count_bytes(item: tuple[Path, bytes | ImageError]) -> int:
    return len(item[1]) if isinstance(item[1], bytes) else 0


def _classify_batch(batch: list[tuple[Path, bytes | ImageError]], process: "ModelProcess") -> Iterator[dict[str, Any]]:
    pictures = [content for _, content in batch if isinstance(content, bytes)]
    predicted = iter(process.predict(pictures) if pictures else ())
    for file, content in batch:
        row = {"error": str(content)} if isinstance(content, ImageError) else next(predicted)
        yield {"image": str(file), **row}


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row if key not in {"run_id", "model_version"}))
    table = Table(*columns)
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values))
    # Paths are printed whole, even where the terminal is narrow or there is none.
    Console(width=max(Console().width, 100 + max(len(str(row["image"])) for row in rows))).print(table)


TOOLS = [predict, config, erase]
