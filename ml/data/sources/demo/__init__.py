"""The demo source: pictures drawn procedurally, with the names, folders, slides, cases and proportions of BreakHis.

They let the whole workflow be tried without any data, and prove nothing about medicine. Each subtype has its own
architecture (``subtypes``); each case has its own stain, section thickness, nuclear size and camera, shared by all
its slides (``cases``); each magnification shows the same micrometres at its own scale. So a network has to learn
texture, and a case it has not seen is not trivially right.

``planning`` says which pictures there are, ``drawing`` makes the pixels of one, ``writing`` makes the source's files.
"""

from ml.data.sources.demo.drawing import DRAWING_VERSION, draw_picture
from ml.data.sources.demo.planning import MAX_PICTURES, MIN_PICTURES, plan_pictures
from ml.data.sources.demo.writing import draw_files

__all__ = [
    "DRAWING_VERSION",
    "MAX_PICTURES",
    "MIN_PICTURES",
    "draw_files",
    "draw_picture",
    "plan_pictures",
]
