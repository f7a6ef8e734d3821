"""Facts about BreakHis: its classes, its file-name grammar, its slides and cases, and its whole inventory.

Source: F. Spanhol, L. Oliveira, C. Petitjean, L. Heutte, "A Dataset for Breast Cancer Histopathological Image
Classification", IEEE Transactions on Biomedical Engineering 63(7), 2016. The data set is licensed CC BY 4.0.
"""

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple, get_args

from ml.core.messages import quote_value

LABELS = ("benign", "malignant")
"""Binary classes; the position is the class index, and 1 (malignant) is the positive class."""

Subtype = Literal["A", "F", "PT", "TA", "DC", "LC", "MC", "PC"]
SUBTYPES: tuple[Subtype, ...] = get_args(Subtype)
"""Tumour subtypes; the position is the class index of the subtype model."""

SUBTYPE_NAMES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
"""The names of the subtypes as the original tree spells its folders."""

MAGNIFICATIONS = (40, 100, 200, 400)

IMAGE_SIZES = ((700, 460), (700, 456))
"""(width, height) in pixels; only slide PC 14-12465 has the second."""

SIDES = ("train", "validation", "test")
"""The sides (subsets) of a split, in the usual order."""

Task = Literal["binary", "subtype"]
TASKS: tuple[Task, ...] = get_args(Task)

DUPLICATED_SLIDE = "14-13412"
"""Slide whose images were published under two subtypes, DC and LC; no source says which one is right."""

_LABEL_LETTERS = {"B": "benign", "M": "malignant"}
_BENIGN_SUBTYPES = frozenset({"A", "F", "PT", "TA"})
_NAME_PATTERN = re.compile(
    r"SOB_(B|M)_(A|F|PT|TA|DC|LC|MC|PC)-([0-9]{2})-([0-9]+)([A-Z]*)-(40|100|200|400)-([0-9]{3})\.png"
)
NAME_PATTERN = _NAME_PATTERN.pattern
"""The file-name grammar as a regular expression, for what can use nothing else; :func:`parse_name` reads names."""

_SLIDE_PATTERN = re.compile(r"([0-9]{2})-([0-9]+)([A-Z]*)")


def class_names(task: str) -> tuple[str, ...]:
    """Returns the class names of a task in the order of the model's outputs."""
    return LABELS if task == "binary" else SUBTYPES


def label_of(subtype: str) -> str:
    """Returns ``benign`` or ``malignant`` for a subtype code such as ``DC``.

    Raises:
        ValueError: the code is unknown.
    """
    if subtype not in SUBTYPE_NAMES:
        raise ValueError(f"unknown subtype {quote_value(subtype)}; known: {', '.join(SUBTYPES)}")
    return "benign" if subtype in _BENIGN_SUBTYPES else "malignant"


def case_of(slide: str) -> str:
    """Returns the case number of a slide id: ``14-22549AB`` -> ``14-22549``.

    The 82 slide folders have 81 slide ids and 70 case numbers. No publication says that one case number is one patient;
    grouping by case is the cautious choice, since no reading of the numbers makes it leak.

    Raises:
        ValueError: the text is no BreakHis slide id.
    """
    match = _SLIDE_PATTERN.fullmatch(slide)
    if not match:
        raise ValueError(f"{quote_value(slide)} is not a BreakHis slide id such as 14-22549AB")
    return f"{match[1]}-{match[2]}"


@dataclass(frozen=True, slots=True)
class ImageName:
    """The parts of a BreakHis file name such as ``SOB_B_A-14-22549AB-40-001.png``."""

    subtype: str
    slide: str
    magnification: int
    seq: int
    label: str

    @property
    def case(self) -> str:
        """The case number, which stands for the patient."""
        return case_of(self.slide)

    def __str__(self) -> str:
        letter = "B" if self.label == "benign" else "M"
        return f"SOB_{letter}_{self.subtype}-{self.slide}-{self.magnification}-{self.seq:03d}.png"


def parse_name(name: str) -> ImageName:
    """Parses a file name (without folders).

    The label is the one in the name (``SOB_B``/``SOB_M``); the manifest checks whether it agrees with the subtype.

    Raises:
        ValueError: the name does not follow BreakHis' grammar.
    """
    match = _NAME_PATTERN.fullmatch(name)
    if not match:
        raise ValueError(
            f"{quote_value(name)} is not a BreakHis name: "
            f"SOB_<B|M>_<{'|'.join(SUBTYPES)}>-<yy>-<slide>-<40|100|200|400>-<nnn>.png"
        )
    letter, subtype, year, number, suffix, magnification, seq = match.groups()
    return ImageName(
        subtype=subtype,
        slide=f"{year}-{number}{suffix}",
        magnification=int(magnification),
        seq=int(seq),
        label=_LABEL_LETTERS[letter],
    )


class InventoryRow(NamedTuple):
    """Number of images in the published dataset of one slide folder at one magnification."""

    subtype: str
    slide: str
    magnification: int
    images: int


@cache
def read_inventory() -> tuple[InventoryRow, ...]:
    """Reads the inventory of the published BreakHis (``ml/core/inventory.csv``).

    It has 82 slide folders x 4 magnifications, 7,909 images.
    """
    with files("ml.core").joinpath("inventory.csv").open(encoding="utf-8") as file:
        return tuple(
            InventoryRow(row["subtype"], row["slide"], magnification, int(row[str(magnification)]))
            for row in csv.DictReader(file)
            for magnification in MAGNIFICATIONS
        )


_LAYOUT_PATTERNS = {
    "waseemalastal mirror": re.compile(r"(?:^|/)classificacao_(?:binaria|multiclasse)/(?:40|100|200|400)X/"),
    "ambarish mirror": re.compile(r"(?:^|/)BreaKHis_v1/BreaKHis_v1/histology_slides/"),
    "original tree": re.compile(r"(?:^|/)(?:benign|malignant)/SOB/[a-z_]+/SOB_[BM]_[A-Z]+_[^/]+/(?:40|100|200|400)X/"),
}


def detect_folder_layout(paths: Collection[str]) -> str:
    """Returns the published folder layout of BreakHis that most of these paths have, or ``folders of its own``."""
    for name, pattern in _LAYOUT_PATTERNS.items():
        if sum(pattern.search(path) is not None for path in paths) * 2 > len(paths):
            return name
    return "folders of its own"


def find_folder_contradiction(path: str) -> str | None:
    """Returns how the folders in a file's path contradict its BreakHis name, or None if they do not.

    Only folders named after a label, a subtype, a slide of the original tree or a magnification are compared; of each
    kind the innermost folder counts.

    Raises:
        ValueError: the name does not follow BreakHis' grammar.
    """
    *folders, base = path.split("/")
    name = parse_name(base)
    innermost: dict[str, tuple[str, object, object]] = {}
    for folder in folders:
        if folder.lower() in LABELS:
            innermost["label"] = (folder, folder.lower(), name.label)
        elif subtype := _SUBTYPE_FOLDERS.get(folder.lower()):
            innermost["subtype"] = (folder, subtype, name.subtype)
        elif slide := _SLIDE_FOLDER_PATTERN.fullmatch(folder):
            innermost["slide"] = (folder, f"{slide[1]} {slide[2]}", f"{name.subtype} {name.slide}")
        elif magnification := _MAGNIFICATION_FOLDERS.get(folder.upper()):
            innermost["magnification"] = (folder, magnification, name.magnification)
    for kind, (folder, stated, expected) in innermost.items():
        if stated != expected:
            return f"the folder {folder} contradicts the name, whose {kind} is {expected}"
    return None


_SUBTYPE_FOLDERS = {name: subtype for subtype, name in SUBTYPE_NAMES.items()}
_MAGNIFICATION_FOLDERS = {f"{magnification}X": magnification for magnification in MAGNIFICATIONS}
_SLIDE_FOLDER_PATTERN = re.compile(r"SOB_[BM]_(A|F|PT|TA|DC|LC|MC|PC)_([0-9]{2}-[0-9]+[A-Z]*)")
