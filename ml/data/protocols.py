"""Protocols: the ways of putting a data set on sides under which recipes are compared.

``ledger`` is our own. The others exist to stand beside published figures: they split by slide, as published work does,
so slides of one patient may lie on two sides.
"""

import csv
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ml.core.errors import DataError
from ml.core.store import Store
from ml.core.taxonomy import Task
from ml.data.ledger import Ledger
from ml.data.manifest import read_ties
from ml.data.split_methods import choose_validation_groups
from ml.data.splits import Split, extend_ledger, look_up_sides, read_split, split_dataset
from ml.data.training_sets import SplitMethod, read_dataset

if TYPE_CHECKING:
    import pandas as pd

ProtocolName = Literal["notebooks", "ledger", "spanhol"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)

SPANHOL_FOLDS = 5


class ProtocolSplit(NamedTuple):
    """One split to train and score on."""

    name: str
    """The protocol, and the fold where it has several."""
    split: Split


def make_protocol_splits(protocol: ProtocolName, task: Task, dataset: str, store: Store) -> list[ProtocolSplit]:
    """The splits of a protocol.

    - ``notebooks``: binary: slides by chance within benign and malignant; subtype: two stages of StratifiedGroupKFold.
      What their notebooks leave open, the shares (70/15/15) and the seed, is the data set's own.
    - ``ledger``: the training set's own ledger, by case.
    - ``spanhol``: the five folds of F. A. Spanhol et al., IEEE TBME 63(7), 2016, each slide in train (54) or test (28).
      Of their train, one slide in six is validation. They trained a model for each magnification, we one for all.

    Raises:
        DataError: the data set is not BreakHis, where the protocol is for that alone; or it is too small.
        StoreError: the ledger was edited.
    """
    if protocol == "ledger":
        return [ProtocolSplit(protocol, read_split(split_dataset(dataset, store)["split"], store))]
    rows = read_dataset(dataset, store)
    if protocol == "spanhol":
        return [
            ProtocolSplit(f"spanhol fold {number}", _spanhol(rows, number)) for number in range(1, SPANHOL_FOLDS + 1)
        ]
    method: SplitMethod = "stratified" if task == "binary" else "sgkf"
    seed = int(store.meta(dataset)["seed"])
    dealt, quarantine = extend_ledger(
        Ledger("notebooks", method, "slide"), rows, read_ties(dataset, store), dataset=dataset, seed=seed
    )
    return [ProtocolSplit(protocol, Split("slide", dealt.sides, frozenset(quarantine["pixel_sha256"])))]


@cache
def spanhol_test_folds() -> dict[tuple[str, str], frozenset[int]]:
    """(subtype, slide) -> in which of the five folds it is a test slide (``ml/data/spanhol_folds.csv``)."""
    lines = files("ml.data").joinpath("spanhol_folds.csv").read_text(encoding="utf-8").splitlines()
    return {
        (row["subtype"], row["slide"]): frozenset(map(int, row["test_in"].split())) for row in csv.DictReader(lines)
    }


def _spanhol(rows: "pd.DataFrame", number: int) -> Split:
    published, sides = spanhol_test_folds(), dict[str, str]()
    of_slide = rows.groupby("slide")["subtype"].unique()
    for slide, subtypes in of_slide.items():
        known = [published.get((subtype, str(slide))) for subtype in subtypes]
        if None in known:
            raise DataError(
                f"the protocol spanhol is for BreakHis alone, whose folds have no slide {slide} of {subtypes[0]}; "
                "leave the protocol out, or compare on a training set of BreakHis alone"
            )
        sides[str(slide)] = "test" if number in known[0] else "train"  # type: ignore[operator]
    learnt = rows[rows["slide"].map(sides) == "train"]
    seed = number
    held_out = choose_validation_groups(learnt["slide"].tolist(), learnt["subtype"].tolist(), seed=seed)
    split = Split("slide", {**sides, **dict.fromkeys(held_out, "validation")})
    look_up_sides(rows, split)  # says so where pictures would lie on two sides
    return split
