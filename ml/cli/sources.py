"""``breakhis sources``: adds, checks and lists data sources, and draws pictures to try one with."""

import json
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ml.cli.options import json_option, output_result
from ml.core.disks import explained_os_errors
from ml.core.errors import BreakhisError, ConfigError
from ml.core.messages import cut_text, quote_value
from ml.core.settings import read_settings
from ml.core.store import Json, Store
from ml.core.yaml_files import MAX_NAME, is_name
from ml.data.sources import PLACEHOLDER, SOURCE_KINDS, TableSpec, load_source, source_files

_FIRST_KEYS = ("name", "kind", "description")


@click.group()
def sources() -> None:
    """Add, check and list sources: one YAML file in dags/sources is one source and one ingest DAG."""


@sources.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(list(SOURCE_KINDS)), required=True, help="Where its images come from.")
@click.option(
    "--layout",
    type=click.Choice(["breakhis", "table"]),
    default="breakhis",
    help="Whether file names or a table describe the images.",
)
@json_option
def new(name: str, kind: str, layout: str, as_json: bool) -> None:
    """Write a commented YAML file for the source NAME, to be filled in; one that is there is never overwritten."""
    if not is_name(name):
        raise ConfigError(
            f"{quote_value(name)} cannot be a source's name: it is made of a-z, 0-9, _ and -, begins with a letter and "
            f"has {MAX_NAME} characters at the most"
        )
    path = read_settings().conf / "sources" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # It is written beside and linked, since Airflow may read the folder at any moment.
        scratch = path.with_suffix(".new")
        scratch.write_text(_write_commented_yaml({"name": name, "kind": kind, "layout": layout}))
        os.link(scratch, path)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; edit it, or choose another name") from None
    finally:
        scratch.unlink(missing_ok=True)
    missing = [field for field, about in SOURCE_KINDS[kind].model_fields.items() if _is_required(field, about)]
    if layout == "table":
        missing += [f"table.{field}" for field, about in TableSpec.model_fields.items() if _is_required(field, about)]
    output_result({"file": str(path), "fill_in": missing, "then": f"breakhis sources check {name}"}, as_json, None)


@sources.command()
@click.argument("source", type=click.Path())
@json_option
def check(source: str, as_json: bool) -> None:
    """Check SOURCE (a name in dags/sources or a .yaml path) without fetching anything.

    Exit status 3 if it does not fit.
    """
    spec = load_source(source, read_settings().conf)
    if spec.validation.more:
        from ml.data.validation.checks import build_suite
        from ml.data.validation.suite import verify_expectations

        verify_expectations(build_suite(spec.inventory, spec.layout, spec.validation), str(spec.file))
    output_result({"file": str(spec.file), **spec.model_dump(mode="json")}, as_json, None)


@sources.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List every source: its kind, its schedule, its last version and how far it has come."""
    settings = read_settings()
    rows = [_describe_source(file, Store(settings.store)) for file in source_files(settings)]
    if as_json:
        click.echo(json.dumps({"sources": rows}, sort_keys=True))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    columns = ("name", "kind", "schedule", "images", "version", "published", "state")
    grid = Grid(*columns)
    for row in rows:
        grid.add_row(*(escape(str(row[column] if row[column] is not None else "")) for column in columns))
    Console(width=max(Console().width, 150)).print(grid)


@sources.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--images", default=164, show_default=True, help="How many: 82 to 7,909, the size of BreakHis.")
@click.option("--seed", default=1, show_default=True, help="The same seed draws the same pictures.")
@json_option
def draw(folder: Path, images: int, seed: int, as_json: bool) -> None:
    """Draw pictures into FOLDER, named and filed as BreakHis is: something to try a source with."""
    from ml.data.sources.demo import draw_files

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name a new or empty folder")
    is_new = not folder.exists()
    try:
        with explained_os_errors(folder):
            for path, content in draw_files(images, seed, read_settings().worker_count):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    except BaseException:  # also where somebody stops it; the folder was new or empty, so all in it is ours
        for made in [folder] if is_new else list(folder.iterdir()):
            shutil.rmtree(made, ignore_errors=True)
        raise
    output_result({"folder": str(folder), "images": images}, as_json, None)


def _describe_source(file: Path, store: Store) -> Json:
    row: dict[str, Any] = dict.fromkeys(("kind", "schedule", "images", "version", "published"))
    row |= {"name": cut_text(file.stem), "file": str(file)}
    try:
        spec = load_source(str(file), read_settings().conf)
    except BreakhisError as error:
        return {**row, "state": f"invalid: {error}"}
    row |= {"name": spec.name, "kind": spec.kind, "schedule": spec.schedule}
    published, _ = store.read(f"refs/sources/{spec.name}.json")
    if published:
        row |= {key: published[key] for key in ("images", "version", "published")}
    fetched, _ = store.read(f"refs/raw/{spec.name}.json")
    return {**row, "state": _describe_state(fetched, published, store)}


def _describe_state(fetched: Json | None, published: Json | None, store: Store) -> str:
    if not fetched:
        return "never ingested"
    if not published:
        return "fetched, not published"
    raw = store.meta(published["manifest"])["raw"]
    return "published" if raw == fetched["raw"] else "published; what was fetched since is not"


def _is_required(name: str, about: Any) -> bool:
    return about.default is PydanticUndefined and about.default_factory is None and name not in _FIRST_KEYS


def _write_commented_yaml(values: dict[str, str]) -> str:
    """Returns the YAML text of a source, with every key of its kind, what each means, and its default.

    Args:
        values: the values that are known: ``name``, ``kind`` and ``layout``.
    """
    kind = SOURCE_KINDS[values["kind"]]
    keys = (*_FIRST_KEYS, *(key for key in kind.model_fields if key not in _FIRST_KEYS))
    fields = {key: kind.model_fields[key] for key in keys}
    lines = [f"# {(kind.__doc__ or '').strip()}", "# Lines with a default may be left out.", ""]
    for key, field in fields.items():
        if key == "table" and values["layout"] == "table":
            table = textwrap.indent(_format_table_keys(), "  ").splitlines()
            lines += [*_format_comment(field.description), "table:", *table, ""]
        else:
            value = values.get(
                key, PLACEHOLDER if _is_required(key, field) else field.get_default(call_default_factory=True)
            )
            value = value.model_dump(exclude_defaults=True) if isinstance(value, BaseModel) else value
            lines += [*_format_comment(field.description), yaml.safe_dump({key: value}, allow_unicode=True).strip(), ""]
    return "\n".join(lines)


def _format_table_keys() -> str:
    lines: list[str] = []
    for key, field in TableSpec.model_fields.items():
        value = PLACEHOLDER if _is_required(key, field) else field.get_default(call_default_factory=True)
        lines += [*_format_comment(field.description), yaml.safe_dump({key: value}, allow_unicode=True).strip()]
    return "\n".join(lines)


def _format_comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", 110, initial_indent="# ", subsequent_indent="# ")
