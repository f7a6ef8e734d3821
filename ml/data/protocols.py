"""Split protocols under which recipes are compared.

``ledger`` is our own. The others reproduce published protocols, so that results can be compared with published figures:
they split by slide, so slides of one patient may lie on two sides.
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
    """A split of a protocol, to train and score on."""

    name: str
    """The protocol's name, with the fold where it has several."""
    split: Split


def make_protocol_splits(protocol: ProtocolName, task: Task, dataset: str, store: Store) -> list[ProtocolSplit]:
    """Makes the splits of a protocol.

    - ``notebooks``: the binary task splits slides at random within benign and malignant; the subtype task splits them
      by two stages of StratifiedGroupKFold. The baseline's notebooks do not state shares and seed, so those of the data
      set are used (70/15/15).
    - ``ledger``: the training set's own ledger, by case.
    - ``spanhol``: the five folds of F. A. Spanhol et al., IEEE TBME 63(7), 2016, with each slide in train (54) or test
      (28). One slide in six of their train is validation. They trained one model per magnification, we train one model
      for all.

    Raises:
        DataError: the protocol is for BreakHis alone, and the data set is another; or it is too small.
        StoreError: the ledger was edited.
    """
    if protocol == "ledger":
        return [ProtocolSplit(protocol, read_split(split_dataset(dataset, store)["split"], store))]
    rows = read_dataset(dataset, store)
    if protocol == "spanhol":
        return [
            ProtocolSplit(f"spanhol fold {number}", _make_spanhol_split(rows, number))
            for number in range(1, SPANHOL_FOLDS + 1)
        ]
    method: SplitMethod = "stratified" if task == "binary" else "sgkf"
    seed = int(store.meta(dataset)["seed"])
    ledger, quarantine = extend_ledger(
        Ledger("notebooks", method, "slide"), rows, read_ties(dataset, store), dataset=dataset, seed=seed
    )
    return [ProtocolSplit(protocol, Split("slide", ledger.sides, frozenset(quarantine["pixel_sha256"])))]


@cache
def spanhol_test_folds() -> dict[tuple[str, str], frozenset[int]]:
    """Returns the folds (1 to 5) in which each (subtype, slide) is a test slide, from ``ml/data/spanhol_folds.csv``."""
    lines = files("ml.data").joinpath("spanhol_folds.csv").read_text(encoding="utf-8").splitlines()
    return {
        (row["subtype"], row["slide"]): frozenset(map(int, row["test_in"].split())) for row in csv.DictReader(lines)
    }


def _make_spanhol_split(rows: "pd.DataFrame", number: int) -> Split:
    """Makes the split of fold ``number`` (1 to 5); a slide in six of its train is validation."""
    published, sides = spanhol_test_folds(), dict[str, str]()
    subtypes_of_slide = rows.groupby("slide")["subtype"].unique()
    for slide, subtypes in subtypes_of_slide.items():
        test_folds = [published.get((subtype, str(slide))) for subtype in subtypes]
        if None in test_folds:
            raise DataError(
                f"the protocol spanhol is for BreakHis alone, whose folds have no slide {slide} of {subtypes[0]}; "
                "leave the protocol out, or compare on a training set of BreakHis alone"
            )
        sides[str(slide)] = "test" if number in test_folds[0] else "train"  # type: ignore[operator]
    train = rows[rows["slide"].map(sides) == "train"]
    seed = number
    held_out = choose_validation_groups(train["slide"].tolist(), train["subtype"].tolist(), seed=seed)
    split = Split("slide", {**sides, **dict.fromkeys(held_out, "validation")})
    look_up_sides(rows, split)  # raises if a picture would lie on two sides
    return split
