"""The YAML files of sources, as one typed model per kind."""

import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, ValidationInfo, field_serializer, field_validator, model_validator

from ml.core.errors import ConfigError
from ml.core.messages import cut_text, hide_access, list_items, quote_value
from ml.core.names import expand_home, resolve_links
from ml.core.taxonomy import SUBTYPES
from ml.core.yaml_files import Name, Schedule, YamlModel, find_yaml, list_yaml, read_mapping, validate_mapping
from ml.data.identifiers import lower_suffix, normalize_identifier, normalize_path
from ml.data.sources.check_settings import ValidationSettings

if TYPE_CHECKING:
    from ml.core.settings import Settings

S3_KEY_VARIABLES = ("BREAKHIS_SOURCE_KEY", "BREAKHIS_SOURCE_SECRET")
"""Environment variables with an S3 source's own key; AWS_ACCESS_KEY_ID and so on may be those of the store."""

DEMO_IMAGES = (82, 7909)
"""Least and greatest number of pictures of the demo source: one for each slide folder, and as many as BreakHis has."""

PLACEHOLDER = "TO FILL IN"
"""``breakhis sources new`` writes this where only the user knows the value."""

_KAGGLE_DATASET = re.compile(
    r"(?P<owner>[A-Za-z0-9-]+)/(?P<slug>[A-Za-z0-9-]+)(/(versions/)?(?P<version>[1-9][0-9]*))?"
)


def require_known_subtypes(value: dict[str, str]) -> dict[str, str]:
    """Returns a mapping to subtypes, if all of them are known.

    Raises:
        ValueError: names those that are unknown.
    """
    if unknown := sorted(set(value.values()) - set(SUBTYPES)):
        raise ValueError(f"unknown subtypes {list_items(unknown)}; there are: {', '.join(SUBTYPES)}")
    return value


def require_one_meaning(value: dict[str, str]) -> dict[str, str]:
    """Returns a mapping from identifiers, if those that are the same have the same value.

    Raises:
        ValueError: names one that has two.
    """
    meanings: dict[str, str] = {}
    for said, meaning in value.items():
        before = meanings.setdefault(normalize_identifier(said), meaning)
        if before != meaning:
            raise ValueError(f"{quote_value(said)} is there twice, as {cut_text(before)} and as {cut_text(meaning)}")
    return value


class TableSpec(YamlModel):
    """A CSV or Parquet file of the source with a row for each image, and the meaning of its columns."""

    file: str = Field(description="Its path within the source; .csv (UTF-8, with a header) or .parquet.")
    path: str = Field(description="Column: the image's path within the source, or its file name if that is unique.")
    patient: str = Field(description="Column: whatever tells patients apart; all images of one stay together.")
    slide: str | None = Field(None, description="Column: the slide; default: a patient has one.")
    subtype: str = Field(description="Column: the tumour's subtype.")
    magnification: str = Field(description="Column: the objective's magnification, such as 40 or 40x.")
    subtypes: dict[str, str] = Field(
        default_factory=dict,
        description="From what the subtype column says to A, F, PT, TA (benign), DC, LC, MC or PC (malignant). Rows "
        "with a value that is neither here nor one of these are quarantined.",
    )

    @field_validator("file", mode="after")
    @classmethod
    def _readable(cls, value: str) -> str:
        path = normalize_path(value)
        if (
            not lower_suffix(path).endswith((".csv", ".parquet"))
            or path.startswith("/")
            or ".." in PurePosixPath(path).parts
        ):
            raise ValueError(f"{quote_value(value)} must be the path of a .csv or .parquet file within the source")
        return path

    @field_validator("subtypes", mode="after")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        return require_known_subtypes(require_one_meaning(value))

    def is_at(self, path: str) -> bool:
        """Says whether the file at a path of the source is the table; its suffix may be in any case."""
        return lower_suffix(normalize_path(path)) == lower_suffix(self.file)


_MAX_BYTES = Field(None, ge=1, description="The most that is downloaded, in bytes; default: what fits on the disk.")


class SourceSpec(YamlModel):
    """The settings that sources of every kind have. Made by :func:`load_source`."""

    name: Name = Field(description="The file's name without .yaml; becomes the DAG ingest_<name>.")
    kind: str = Field(description="directory, kaggle, s3, http or demo.")
    description: str = Field("", description="What the source is; shown as the DAG's documentation.")
    inventory: bool = Field(False, description="Whether the source claims to be the whole published BreakHis.")
    schedule: Schedule | None = Field(None, description="When to ingest: @daily … or five cron fields; null: by hand.")

    layout: Literal["breakhis", "table"] = Field(
        "breakhis", description="breakhis: file names tell all, in whatever folders; table: a table does."
    )
    table: TableSpec | None = Field(None, description="For the layout table: where it lies and what its columns are.")
    cohort: Name | None = Field(
        None,
        description="Sources of one cohort name the same patients alike, and the layout breakhis also the same images; "
        "default: breakhis for that layout (demo for drawings), for a table the source's own name.",
    )
    trust: dict[str, str] = Field(
        default_factory=dict,
        description="Slide -> subtype, for a slide that stands under two, such as {14-13412: LC}. Its images under any "
        "other are quarantined; without this, all of them are.",
    )
    significant_bits: int | None = Field(
        None,
        ge=9,
        le=16,
        description="For pictures with 16 bits a channel: how many of them the camera fills, such as 12. A value v "
        "becomes round(255 v / (2^bits - 1)); without this, such pictures are quarantined.",
    )
    validation: ValidationSettings = Field(
        ValidationSettings(),
        description="What is demanded otherwise than usual, by check, such as {image_sizes: {severity: critical}}, and "
        "further expectations under 'more'. The Data Docs show it.",
    )

    _file: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _fits_layout(self) -> Self:
        if (self.layout == "table") != (self.table is not None):
            raise ValueError("'layout: table' and the mapping 'table' belong together: give both or neither")
        if self.table and self.inventory:
            raise ValueError("'inventory' is about BreakHis' file names; a source with a table has none")
        if not self.cohort:  # the model is frozen for its users, and this default depends on other fields
            named = self.kind if self.kind == "demo" else self.layout
            object.__setattr__(self, "cohort", self.name if self.table else named)
        return self

    @field_validator("trust", mode="after")
    @classmethod
    def _subtypes(cls, value: dict[str, str]) -> dict[str, str]:
        return require_known_subtypes(require_one_meaning(value))

    def model_post_init(self, context: Any) -> None:
        """Keeps the path of the YAML file, which ``validate_mapping`` passes as the validation context."""
        if context:
            self._file = context["path"]

    @property
    def file(self) -> Path:
        """The YAML file that this was read from."""
        return self._file

    def trusted_subtype(self, slide: str) -> str | None:
        """Returns the subtype that the source trusts for a slide of a manifest; None if it names none."""
        trust = {normalize_identifier(trusted): subtype for trusted, subtype in self.trust.items()}
        return trust.get(slide.removeprefix(f"{self.cohort}:"))


class DirectorySource(SourceSpec):
    """Image files in a folder of this machine, at any depth."""

    kind: Literal["directory"]
    path: Path = Field(description="The folder: absolute, from ~, or relative to the YAML file.")

    @field_validator("path", mode="after")
    @classmethod
    def _anchored(cls, value: Path, info: ValidationInfo) -> Path:
        base = info.context["path"].parent if info.context else Path.cwd()
        return resolve_links(base / expand_home(value))


class KaggleSource(SourceSpec):
    """A data set on Kaggle, downloaded with the official package and the user's own credentials."""

    kind: Literal["kaggle"]
    dataset: str = Field(description="owner/slug for the latest version, or owner/slug/versions/4 for a fixed one.")
    connection: str | None = Field(
        None, description="Airflow connection with a token; default: the worker's KAGGLE_… variables or kaggle.json."
    )
    max_bytes: int | None = _MAX_BYTES

    @field_validator("dataset", mode="after")
    @classmethod
    def _handle(cls, value: str) -> str:
        if not _KAGGLE_DATASET.fullmatch(value):
            raise ValueError(
                f"{quote_value(value)} is not a Kaggle data set; write owner/slug as in its address "
                "kaggle.com/datasets/owner/slug, or owner/slug/versions/4 for a fixed version"
            )
        return value

    @property
    def owner(self) -> str:
        """The publisher of the data set."""
        return self._part("owner")

    @property
    def slug(self) -> str:
        """The data set's name in its address."""
        return self._part("slug")

    @property
    def version(self) -> int | None:
        """The requested version; None stands for the latest."""
        return int(self._part("version")) if self._part("version") else None

    def _part(self, name: str) -> str:
        match = _KAGGLE_DATASET.fullmatch(self.dataset)
        assert match
        return match[name] or ""


class S3Source(SourceSpec):
    """Objects in an S3 store: the image files below a prefix, or one archive of them."""

    kind: Literal["s3"]
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="The bucket's name.")
    prefix: str = Field("", description="What the images' keys begin with, such as breakhis/; default: all there are.")
    archive: str = Field("", description="Instead of prefix: the key of one .zip, .tar or .tar.gz with the images.")
    endpoint: str = Field("", pattern=r"^(https?://[^/@\s?#;]+/?)?$", description="The server; default: AWS.")
    region: str = Field(
        "us-east-1",
        pattern=r"^[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?$",
        description="Its region; most stores other than AWS do not care.",
    )
    connection: str | None = Field(
        None, description="Airflow connection of type aws with the key; default: the worker's own AWS credentials."
    )
    max_bytes: int | None = _MAX_BYTES

    @field_validator("endpoint", mode="after")
    @classmethod
    def _has_port(cls, value: str) -> str:
        if value:
            _ = urlsplit(value).port  # raises ValueError, which says what a port is
        return value

    @field_validator("region", mode="after")
    @classmethod
    def _is_no_number(cls, value: str) -> str:
        if value.isdigit():
            raise ValueError(f"{quote_value(value)} is a number and no region, such as us-east-1")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.prefix and self.archive:
            raise ValueError("'prefix' and 'archive' are both given; images lie below one or in the other")
        return self


class HttpSource(SourceSpec):
    """An archive of image files at a web address, known by its hash."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://[^\s]+$", description="Address of a .zip, .tar or .tar.gz.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="The archive's SHA-256, as sha256sum prints it.")
    max_bytes: int | None = _MAX_BYTES

    @field_validator("url", mode="after")
    @classmethod
    def _no_password(cls, value: str) -> str:
        if urlsplit(value).username is not None:
            raise ValueError("has a user or password in it; a YAML file is no place for them")
        return value

    @field_serializer("url")
    def _hide_access(self, value: str) -> str:
        return hide_access(value)

    @property
    def shown_url(self) -> str:
        """The address as messages and the store show it: cut, without what may grant access."""
        return cut_text(hide_access(self.url))


class DemoSource(SourceSpec):
    """Pictures drawn by this package, for trying the whole workflow without any data."""

    kind: Literal["demo"]
    images: int = Field(640, ge=DEMO_IMAGES[0], le=DEMO_IMAGES[1], description="How many pictures to draw.")
    seed: int = Field(1, ge=0, description="The same seed draws the same pictures.")


SOURCE_KINDS: dict[str, type[SourceSpec]] = {
    "directory": DirectorySource,
    "kaggle": KaggleSource,
    "s3": S3Source,
    "http": HttpSource,
    "demo": DemoSource,
}


def load_source(reference: str | Path, conf: Path, relative_to: Path | None = None) -> SourceSpec:
    """Reads a source's YAML file.

    Args:
        reference: a bare name, looked up in ``conf``/sources, or a path ending in .yaml.
        conf: the folder with sources/ (``settings.conf``).
        relative_to: the folder that a relative path starts from; default: the working directory.

    Raises:
        ConfigError: the file is missing or invalid; names the file and each offending key.
    """
    path = find_yaml(conf / "sources", str(reference), relative_to)
    block = read_mapping(path)
    data = block.texts()
    kind = data.get("kind")
    known = ", ".join(SOURCE_KINDS)
    if kind is None:
        raise ConfigError(f"{path}: 'kind' is missing (one of: {known})")
    if not isinstance(kind, str) or kind not in SOURCE_KINDS:
        raise ConfigError(f"{path}: unknown kind {quote_value(kind)} (known: {known})")
    table = data.get("table")
    values = {**data, **({f"table.{key}": value for key, value in table.items()} if isinstance(table, dict) else {})}
    if unfilled := [key for key, value in values.items() if value == PLACEHOLDER]:
        raise ConfigError(f"{path}: still to be filled in: {list_items(unfilled)}")
    spec = validate_mapping(block, SOURCE_KINDS[kind], path)
    if spec.name != path.stem:
        # `breakhis fetch NAME` finds the file by the name, and the name is the source's identity in the store.
        raise ConfigError(
            f"{path}: 'name' is {quote_value(spec.name)}, but the file is called {path.name}: make them agree"
        )
    return spec


def source_name(reference: str) -> str:
    """Returns the name of the source that a training set refers to, by name or by file (named like the source)."""
    return Path(reference).stem if reference.endswith(".yaml") else reference


def source_files(settings: "Settings") -> list[Path]:
    """Returns the YAML files of all sources: those in ``conf``/sources, and those that training sets refer to by path.

    A training set that cannot be read contributes none; loading the set itself reports why.
    """
    paths = set(map(resolve_links, list_yaml(settings.conf / "sources")))
    for training_set in [*list_yaml(settings.conf / "training_sets"), *settings.training_sets]:
        try:
            references = read_mapping(training_set).texts().get("sources")
        except ConfigError:
            continue
        for reference in references if isinstance(references, list) else []:
            if isinstance(reference, str) and reference.endswith(".yaml"):
                with suppress(ValueError):
                    paths.add(resolve_links(training_set.parent / expand_home(reference)))
    return sorted(paths)
