"""A field of view of the demo source: stroma, structures and nuclei are drawn, then photographed.

A picture is built as stain works: amounts of haematoxylin and eosin per pixel, turned into light by
Beer-Lambert with the stain vectors of A. Ruifrok and D. Johnston, "Quantification of histochemical staining by color
deconvolution", Analytical and Quantitative Cytology and Histology 23(4), 2001.
"""

from dataclasses import dataclass, field

import numpy as np

from ml.data.sources.demo.cases import Case
from ml.data.sources.demo.nuclei import LYMPHOCYTE, NucleusKind, draw_nuclei
from ml.data.sources.demo.textures import HEIGHT, WIDTH, Floats, blur, camera_grain, resize, sample_fibres, stamp_each
from ml.images.decoding import Pixels

_PIXEL = {40: 1.75, 100: 0.70, 200: 0.35, 400: 0.175}  # micrometres; a nucleus of 8 um is 46 pixels wide at 400X
_COARSE = {40: 2, 100: 2, 200: 2, 400: 4}  # architecture is drawn in pixels of this size: optics hide finer detail
_FINE = {40: 1, 100: 1, 200: 1, 400: 2}  # nuclei likewise


@dataclass(slots=True)
class Tissue:
    """A field of view under construction. Maps are coarse (see ``_COARSE``); distances and places are in micrometres.

    ``distance`` maps are signed: negative inside a structure, positive outside.
    """

    case: Case
    magnification: int
    rng: np.random.Generator
    shape: tuple[int, int] = field(init=False)
    unit: float = field(init=False)  # micrometres per coarse pixel
    pixel: float = field(init=False)  # micrometres per fine pixel, for nuclei
    size: tuple[float, float] = field(init=False)  # width and height of the field
    eosin: Floats = field(init=False)
    haematoxylin: Floats = field(init=False)
    white: Floats = field(init=False)  # 0 tissue .. 1 empty glass
    room: Floats = field(init=False)  # 0..1: where stromal nuclei may lie
    along: Floats = field(init=False)  # coordinates along and across the fibres
    across: Floats = field(init=False)
    nuclei: Floats = field(init=False)

    def __post_init__(self) -> None:
        coarse, fine = _COARSE[self.magnification], _FINE[self.magnification]
        self.shape = (HEIGHT // coarse, WIDTH // coarse)
        self.unit = _PIXEL[self.magnification] * coarse
        self.pixel = _PIXEL[self.magnification] * fine
        self.size = (WIDTH * _PIXEL[self.magnification], HEIGHT * _PIXEL[self.magnification])
        self.eosin = np.zeros(self.shape, np.float32)
        self.haematoxylin = np.zeros(self.shape, np.float32)
        self.white = np.zeros(self.shape, np.float32)
        self.room = np.ones(self.shape, np.float32)
        self.nuclei = np.zeros((HEIGHT // fine, WIDTH // fine), np.float32)

    # --- fields -----------------------------------------------------------------------------------------------

    def noise(self, wavelength: float) -> Floats:
        """Returns smooth noise of about unit spread; ``wavelength`` is in micrometres."""
        width, height = (side / wavelength for side in self.size)
        grid = self.rng.standard_normal((int(height) + 4, int(width) + 4)).astype(np.float32)
        dx, dy = self.rng.uniform(1, 2, 2)
        return 1.5 * resize(grid, self.shape, (dx, dy, dx + width, dy + height))

    def contour(self, values: Floats, level: float = 0.0) -> Floats:
        """Returns the distance to where ``values`` crosses ``level``, to first order; negative above the level."""
        down, right = np.gradient(values, self.unit)
        steepness = np.sqrt(down * down + right * right)
        distance: Floats = (level - values) / (steepness + 0.25 * float(steepness.mean()))
        return distance

    def covering(self, values: Floats, share: float) -> Floats:
        """Returns the distance to the part of the field where ``values`` are highest, a ``share`` of its area.

        A share rather than a fixed level, since photographers look for the tumour at every magnification.
        """
        return self.contour(values, float(np.quantile(values[::4, ::4], 1 - share)))

    def blobs(self, spacing: float, radius: tuple[float, float], where: Floats, jitter: float = 0.2) -> Floats:
        """Returns the distance to roundish blobs on a jittered lattice; ``where`` is the probability of each."""
        x, y = self.scatter(spacing, margin=radius[1], jitter=jitter)
        keep = self.rng.random(len(x)) < self.at(where, x, y)
        x, y = x[keep], y[keep]
        return self.stamp_blobs(x, y, radius)

    def stamp_blobs(self, x: Floats, y: Floats, radius: tuple[float, float]) -> Floats:
        """Returns the distance to roundish blobs at given places."""
        far = 12.0
        canvas = np.full(self.shape, far, np.float32)
        if not len(x):
            return canvas
        kinds = min(len(x), 14)
        half = int((radius[1] * 1.35 + far) / self.unit) + 1
        dy, dx = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32) * np.float32(self.unit)
        column = (slice(None), None, None)
        angle = np.arctan2(dy, dx)[None] - self.rng.uniform(0, 2 * np.pi, kinds).astype(np.float32)[column]
        r = self.rng.uniform(*radius, kinds).astype(np.float32)[column]
        oval = self.rng.uniform(0.04, 0.26, kinds).astype(np.float32)[column]
        wave = self.rng.uniform(0.0, 0.09, kinds).astype(np.float32)[column]
        outline = r * (1 + oval * np.cos(2 * angle) + wave * np.sin(3 * angle + r))
        bank = np.minimum(np.hypot(dx, dy)[None] - outline, far)
        which = np.arange(len(x)) % kinds
        stamp_each(canvas, bank, which, x / self.unit, y / self.unit, np.minimum, far)
        return canvas

    # --- places -----------------------------------------------------------------------------------------------

    def scatter(self, spacing: float, margin: float = 8.0, jitter: float = 0.32) -> tuple[Floats, Floats]:
        """Returns places on a jittered hexagonal lattice, which reaches ``margin`` beyond the field."""
        row = spacing * 0.866
        columns = int((self.size[0] + 2 * margin) / spacing) + 2
        rows = int((self.size[1] + 2 * margin) / row) + 2
        y, x = np.mgrid[:rows, :columns].astype(np.float32)
        x = (x + 0.5 * (y % 2)) * spacing - margin - self.rng.uniform(0, spacing)
        y = y * row - margin - self.rng.uniform(0, row)
        push = (jitter * spacing * self.rng.standard_normal((2, rows, columns))).astype(np.float32)
        return (x + push[0]).ravel(), (y + push[1]).ravel()

    def at(self, values: Floats, x: Floats, y: Floats) -> Floats:
        """Returns the value of a map at each place; beyond the field, that of its border."""
        column = np.clip(x / self.unit, 0, self.shape[1] - 1).astype(np.intp)
        row = np.clip(y / self.unit, 0, self.shape[0] - 1).astype(np.intp)
        return values[row, column]

    # --- tissues, in the order they are laid down ---------------------------------------------------------------

    def stroma(self, pink: float, blue: float = 0.04, swirl: float = 60.0, contrast: float = 1.0) -> None:
        """Draws fibres over the whole field: ``pink`` collagen, ``blue`` ground substance, wandering by ``swirl``."""
        angle = self.rng.uniform(0, np.pi)
        y, x = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32) * np.float32(self.unit)
        wander = swirl * self.noise(420)
        waves = 0.12 * swirl * self.noise(70)
        self.along = np.cos(angle) * x + np.sin(angle) * y + 0.5 * swirl * self.noise(300)
        self.across = -np.sin(angle) * x + np.cos(angle) * y + wander + waves
        fibres = sample_fibres(self.along, self.across, max(1.3, 0.7 * self.unit))
        finest = max(0.5, 0.7 * self.unit)
        if self.unit < 1.8:
            fibres = 0.8 * fibres + 0.6 * sample_fibres(self.along, self.across, finest)
        amount = contrast * self.case.fibre
        patches = 1 + 0.18 * self.noise(160)
        self.eosin = pink * patches * np.clip(1 + amount * fibres, 0.1, None)
        self.haematoxylin = blue * (1 + 0.5 * self.noise(110)) * np.clip(1 + 0.5 * amount * fibres, 0.2, None)
        split = self.case.slit * contrast
        self.white = np.clip((fibres - 2.3 + split) * 1.2, 0, 0.85) * (split > 0.05)

    def fill(
        self, inside: Floats, *, pink: float, blue: float, white: float = 0.0, mottle: float = 0.15, grain: float = 14.0
    ) -> None:
        """Replaces the tissue where ``inside`` is 1 (0..1) by cytoplasm, mucin, secretion or glass."""
        texture = 1 + mottle * self.noise(grain)
        self.eosin += inside * (pink * texture - self.eosin)
        self.haematoxylin += inside * (blue * texture - self.haematoxylin)
        self.white += inside * (white - self.white)
        self.room *= 1 - inside

    def inside(self, distance: Floats, edge: float = 1.0) -> Floats:
        """Returns 1 inside a boundary and 0 outside; the edge is ``edge`` micrometres soft, at least a coarse pixel."""
        return np.clip(0.5 - distance / (2 * max(edge, 0.8 * self.unit)), 0, 1)

    def fat(self, share: float) -> None:
        """Draws fat cells, glass with a thin pink wall, in patches of about ``share`` of the field."""
        where = self.inside(self.covering(self.noise(500), share), 20)
        cells = self.blobs(47, (20, 23), where, jitter=0.05)
        self.fill(self.inside(cells), pink=0.0, blue=0.0, white=1.0)

    def bleeding(self, share: float) -> None:
        """Draws red blood cells between the fibres."""
        where = self.inside(self.covering(self.noise(240), share), 10)
        cells = self.blobs(7.5, (2.6, 3.4), 0.85 * where)
        disc = self.inside(cells, 0.6) * (self.room > 0.5)
        self.eosin += disc * (1.15 - self.eosin)
        self.white *= 1 - disc

    def inflammation(self, share: float) -> None:
        """Draws lymphocytes in patches of stroma."""
        where = self.inside(self.covering(self.noise(220), share), 25)
        self.cells(LYMPHOCYTE, 8.5, 0.75 * where * self.room)

    # --- nuclei -------------------------------------------------------------------------------------------------

    def cells(self, kind: NucleusKind, spacing: float, where: Floats, *, direction: Floats | None = None) -> None:
        """Draws nuclei with probability ``where``; ``direction`` is the angle of their long axis, default random."""
        x, y = self.scatter(spacing / self.case.crowding)
        keep = self.rng.random(len(x)) < self.at(where, x, y)
        self.stamp(kind, x[keep], y[keep], direction)

    def fibroblasts(self, kind: NucleusKind, spacing: float, amount: float = 0.8) -> None:
        """Draws spindle nuclei along the fibres, wherever stroma is left."""
        self.cells(kind, spacing, amount * self.room * (self.white < 0.4), direction=self.fibre_angle())

    def fibre_angle(self) -> Floats:
        """Returns the direction of the fibres at each place."""
        down, right = np.gradient(self.across)
        angle: Floats = np.arctan2(right, -down)
        return angle

    def lining(
        self,
        kind: NucleusKind,
        spacing: float,
        distance: Floats,
        depths: tuple[float, ...],
        jitter: float,
        *,
        across: bool = True,
    ) -> None:
        """Draws rows of nuclei at given depths inside a boundary, their long axis ``across`` or along it."""
        down, right = np.gradient(distance, self.unit)
        steep = np.maximum(np.hypot(down, right), 0.3)
        normal = np.arctan2(down, right)
        for depth in depths:
            x, y = self.scatter(spacing / self.case.crowding)
            off = self.at(distance, x, y) + depth
            near = np.abs(off) < 0.5 * spacing + self.unit
            x, y, off = x[near], y[near], off[near]
            steps = (off + jitter * self.rng.standard_normal(len(off))) / self.at(steep, x, y)
            angle = self.at(normal, x, y)
            self.stamp(
                kind, x - steps * np.cos(angle), y - steps * np.sin(angle), normal if across else normal + np.pi / 2
            )

    def stamp(self, kind: NucleusKind, x: Floats, y: Floats, direction: Floats | None = None) -> None:
        """Draws nuclei at given places."""
        if not len(x):
            return
        kinds = 36
        if direction is None:
            which = self.rng.integers(0, kinds, len(x))
        else:
            angle = self.at(direction, x, y) + 0.18 * self.rng.standard_normal(len(x))
            which = (np.floor(angle * (kinds / np.pi)).astype(np.intp)) % kinds
        bank = draw_nuclei(kind, self.case, self.pixel, kinds, self.rng)
        stamp_each(self.nuclei, bank, which, x / self.pixel, y / self.pixel, np.maximum, 0.0)

    # --- the picture ----------------------------------------------------------------------------------------------

    def photograph(self) -> Pixels:
        """Returns the light through the section, a lens and a camera: uint8 (460, 700, 3)."""
        case = self.case
        full = (HEIGHT, WIDTH)
        tissue = 1 - np.clip(self.white, 0, 1)
        thickness = 1 + 0.08 * self.noise(900)
        nuclei = self.nuclei if self.nuclei.shape == full else resize(self.nuclei, full)
        nuclei = blur(nuclei, case.blur * (1.3 if self.magnification >= 200 else 0.8))
        cover = np.minimum(nuclei, 1)
        granular = 1 + 0.09 * self.rng.standard_normal(self.shape, np.float32)
        eosin = resize(self.eosin * tissue * thickness * granular, full)
        haematoxylin = resize(self.haematoxylin * tissue * thickness, full)
        # A nucleus lies in the cytoplasm, so most of the eosin there is displaced.
        eosin *= case.stain[1] * (1 - 0.45 * cover)
        haematoxylin *= 1 - cover
        haematoxylin += nuclei
        haematoxylin *= case.stain[0]
        y, x = np.ogrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
        dx, dy = self.rng.normal(0, 0.03, 2)
        light = (1 - 0.05 * (x * x + y * y) + dx * x + dy * y).astype(np.float32)
        light *= np.float32(np.exp(self.rng.normal(0, 0.03)))
        grain = camera_grain()
        top, left = self.rng.integers(0, grain.shape[0] - HEIGHT), self.rng.integers(0, grain.shape[1] - WIDTH)
        light *= grain[top : top + HEIGHT, left : left + WIDTH]
        rgb = np.empty((*full, 3), np.uint8)
        for channel in range(3):
            density = haematoxylin * case.haematoxylin[channel]
            density += eosin * case.eosin[channel]
            np.exp(-density, out=density)
            density *= light
            density *= case.lamp[channel]
            np.clip(density, 0, 255, out=density)
            rgb[..., channel] = density
        return rgb
