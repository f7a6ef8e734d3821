"""Runs a logged model: reads pictures from standard input and writes predictions, as JSON, to a pipe.

``ml.registry.version_scoring`` starts this file, and nothing imports it. So the ``ml`` that this process imports is the
copy that the model was logged with. A batch is a line with the sizes of its pictures in bytes, as a JSON list, followed
by the pictures. Its answer is a line with a JSON list of rows. The first line that is written says that the model is
loaded.
"""

import json
import os
import sys
from typing import Any


def main(folder: str, answers_to: int) -> None:
    """Load the model in ``folder`` and answer on the file descriptor ``answers_to`` until standard input ends."""
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(folder)
    with os.fdopen(answers_to, "w", encoding="utf-8") as answers:
        print("loaded", file=answers, flush=True)
        while sizes := sys.stdin.buffer.readline():
            pictures = [sys.stdin.buffer.read(size) for size in json.loads(sizes)]
            print(json.dumps(predict(model, pictures)), file=answers, flush=True)


def predict(model: Any, pictures: list[bytes]) -> list[dict[str, Any]]:
    """Returns one row for each picture. A picture that the model refuses has ``{error}``; the others are classified."""
    import pandas as pd

    try:
        rows: list[dict[str, Any]] = model.predict(pd.DataFrame({"image": pictures})).to_dict("records")
    except Exception as error:
        if len(pictures) == 1:
            return [{"error": " ".join(str(error).split()) or type(error).__name__}]
        return [row for picture in pictures for row in predict(model, [picture])]
    return rows


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
