"""The demo source: pictures drawn procedurally, with the names, folders, slides, cases and proportions of BreakHis.

They let the whole workflow be tried without any data, and prove nothing about medicine. Each subtype has its own
architecture (``subtypes``); each case has its own stain, section thickness, nuclear size and camera, shared by all
its slides (``cases``); each magnification shows the same micrometres at its own scale. So a network has to learn
texture, and a case it has not seen is not trivially right.

``planning`` says which pictures there are, ``drawing`` makes the pixels of one, ``writing`` makes the source's files.
"""

from ml.data.sources.demo.drawing import DRAWING_VERSION, draw
from ml.data.sources.demo.planning import LARGEST, SMALLEST, plan
from ml.data.sources.demo.writing import pictures

__all__ = ["DRAWING_VERSION", "LARGEST", "SMALLEST", "draw", "pictures", "plan"]
