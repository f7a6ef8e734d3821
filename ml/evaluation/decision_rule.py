"""From calibrated probabilities to a label: the rule that a training locks before the test side is scored.

Light: it travels with every logged model, and training, evaluation and serving decide by this alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]

_SMALLEST = 1e-12


@dataclass(frozen=True)
class DecisionRule:
    """How a label is taken from calibrated probabilities.

    Attributes:
        threshold: of the binary model: malignant at or above it.
        offsets: of the subtype model, one a class in the order of ``SUBTYPES``: the label is the class with the highest
            log(probability) + offset. Logit adjustment with strength tau has -tau * log(share of the class); no offsets
            are the plain highest probability.
    """

    threshold: float | None = None
    offsets: tuple[float, ...] | None = None

    def assign_labels(self, probabilities: Probabilities) -> NDArray[np.int64]:
        """Class numbers (n,) of probabilities (n,) of malignant, or (n, 8)."""
        if self.threshold is not None:
            return (probabilities >= self.threshold).astype(np.int64)
        scores = np.log(np.maximum(probabilities, _SMALLEST))
        return np.asarray((scores + (self.offsets or 0.0)).argmax(axis=1), dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """For the model's facts and the evidence."""
        return {"threshold": self.threshold, "offsets": list(self.offsets) if self.offsets else None}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "DecisionRule":
        """What :meth:`to_json` made."""
        offsets = facts.get("offsets")
        return cls(facts.get("threshold"), tuple(offsets) if offsets else None)
