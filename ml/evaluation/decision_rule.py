"""The decision rule: how a label follows from calibrated probabilities.

A training fixes its rule before it scores the test side. Training, evaluation and serving assign labels by this module
alone. It imports little, since it travels with every logged model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]

_MIN_PROBABILITY = 1e-12


@dataclass(frozen=True)
class DecisionRule:
    """How a label follows from calibrated probabilities.

    Attributes:
        threshold: decision threshold of the binary model: the label is malignant at or above it.
        offsets: of the subtype model, one for each class in the order of ``SUBTYPES``. The label is the class with the
            highest log(probability) + offset. Logit adjustment with strength tau has the offset -tau * log(class
            prior). Without offsets the label is the class with the highest probability.
    """

    threshold: float | None = None
    offsets: tuple[float, ...] | None = None

    def assign_labels(self, probabilities: Probabilities) -> NDArray[np.int64]:
        """Returns class numbers (n,) for probabilities (n,) of malignant, or (n, 8)."""
        if self.threshold is not None:
            return (probabilities >= self.threshold).astype(np.int64)
        scores = np.log(np.maximum(probabilities, _MIN_PROBABILITY))
        return np.asarray((scores + (self.offsets or 0.0)).argmax(axis=1), dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """Returns the rule as the model's facts and the evidence keep it."""
        return {"threshold": self.threshold, "offsets": list(self.offsets) if self.offsets else None}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "DecisionRule":
        """Returns the rule that :meth:`to_json` wrote; other keys are ignored."""
        offsets = facts.get("offsets")
        return cls(facts.get("threshold"), tuple(offsets) if offsets else None)
