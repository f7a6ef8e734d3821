"""Draws the pixels of one picture of the demo source."""

from dataclasses import replace

from ml.core.taxonomy import DUPLICATED_SLIDE, IMAGE_SIZES, ImageName
from ml.data.sources.demo.cases import draw_case, random_generator
from ml.data.sources.demo.subtypes import ARCHITECTURES, STAIN_UPTAKE
from ml.data.sources.demo.tissue import Tissue
from ml.images.decoding import Pixels

DRAWING_VERSION = 4
"""Increased when the same number and seed would give other pictures, so that earlier drawings are not reused."""

_SHORT_SLIDE = "14-12465"  # the one slide of BreakHis whose pictures are 456 pixels high


def draw_picture(name: ImageName, seed: int) -> Pixels:
    """Draws one picture: uint8 RGB, (460, 700, 3), or (456, 700, 3) for slide PC 14-12465.

    The same (seed, slide, magnification, seq) gives the same pixels in every class: slide 14-13412, which BreakHis
    publishes as DC and as LC, is drawn as LC for both.
    """
    subtype = "LC" if name.slide == DUPLICATED_SLIDE else name.subtype
    case = draw_case(seed, name.slide)
    tint = STAIN_UPTAKE[subtype]
    case = replace(case, stain=(case.stain[0] * tint[0], case.stain[1] * tint[1]))
    tissue = Tissue(
        case, name.magnification, random_generator(seed, "picture", name.slide, name.magnification, name.seq)
    )
    ARCHITECTURES[subtype](tissue)
    width, height = IMAGE_SIZES[name.slide == _SHORT_SLIDE]
    return tissue.photograph()[:height, :width]
