"""The generated corpus's world: invented entities, and the emblem by which each is seen in an image.

A coarse category has a frame colour, a fine category a silhouette, an entity a fill and a glyph; people are figures
with a head and a body. Every fine category in use has two entities: one whose name is its own, and one that shares its
name with an entity of another category, so that only the image tells which of the two a bare mention means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gem_ray.taxonomy import FMNERG

Color = tuple[int, int, int]

# Fine category -> (a name of its own, a name shared with another category).
_NAMES: dict[str, tuple[str, str]] = {
    "athlete": ("Tessa Brandl", "Jorvan"),
    "musician": ("Milo Farrow", "Maribel"),
    "actor": ("Ines Calder", "Vexley"),
    "politician": ("Ruth Okonde", "Vexley"),
    "author": ("Pavel Dorne", "Orrin Vale"),
    "sports_team": ("Redmoor Rovers", "Ardenza"),
    "company": ("Lumatek", "Corvane"),
    "band": ("The Paper Foxes", "Nightglass"),
    "educational_institution": ("Wexmoor Tech", "Grandhall"),
    "city": ("Port Almery", "Ardenza"),
    "country": ("Valdonia", "Jorvan"),
    "park": ("Cedar Hollow Park", "Orrin Vale"),
    "sports_facility": ("Ironmoor Arena", "Halcyon"),
    "cultural_place": ("Lantern Museum", "Grandhall"),
    "film_and_television_works": ("Midnight Ferry", "Maribel"),
    "music": ("Blue Static", "Nightglass"),
    "written_work": ("The Salt Almanac", "Tidewater"),
    "festival": ("Emberfest", "Tidewater"),
    "sports_event": ("Coastal Cup", "Pinnacle Run"),
    "software": ("Quillpad", "Kestrel"),
    "game": ("Starhold", "Pinnacle Run"),
    "brand_name_products": ("Zephyr Cola", "Corvane"),
    "animal": ("Otterley", "Kestrel"),
    "website": ("Snapfable", "Halcyon"),
}

_FRAME_COLORS: dict[str, Color] = {
    "organization": (30, 70, 200),
    "location": (20, 140, 60),
    "building": (120, 70, 30),
    "art": (150, 30, 160),
    "event": (230, 110, 10),
    "product": (10, 150, 170),
    "other": (200, 20, 60),
}
# Regular polygons are (sides, first corner in degrees); the rest are drawn by name.
_SILHOUETTES: tuple[tuple[int, float] | str, ...] = ("disc", (4, 45), (3, -90), "star", (6, 0))
_BODY_COLORS: tuple[Color, ...] = ((215, 40, 40), (40, 90, 220), (30, 150, 70), (240, 190, 30), (140, 60, 170))
_FILL_COLORS: tuple[Color, ...] = ((250, 225, 70), (235, 245, 250), (250, 150, 170), (120, 225, 120))
_HAIR_COLORS: tuple[Color, ...] = ((35, 25, 20), (240, 240, 245))
_SKIN: Color = (236, 190, 150)
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Emblem:
    """An invented entity and how it looks.

    Args:
        name: as written in full; two emblems of different categories may share it.
        fine: fine category.
        variant: 0 or 1, which of its category's two emblems this is.
    """

    name: str
    fine: str
    variant: int

    @property
    def coarse(self) -> str:
        """The coarse category."""
        return FMNERG.parent[self.fine]

    @property
    def surfaces(self) -> tuple[str, ...]:
        """The forms in which posts write the name: in full, and as a hashtag writes it, in one word."""
        joined = "".join(word[0].upper() + word[1:] for word in self.name.split())
        return (self.name,) if joined == self.name else (self.name, joined)

    @property
    def is_ambiguous(self) -> bool:
        """True if an emblem of another category has the same name."""
        return sum(other.name == self.name for other in EMBLEMS) > 1


EMBLEMS: tuple[Emblem, ...] = tuple(
    Emblem(name, fine, variant) for fine, names in _NAMES.items() for variant, name in enumerate(names)
)


@dataclass(frozen=True)
class Tile:
    """A drawn emblem, cropped to its silhouette: `pixels` `(h, w, 3)` uint8, `mask` and each part `(h, w)` bool."""

    pixels: np.ndarray
    mask: np.ndarray
    parts: tuple[np.ndarray, ...]


def draw_emblem(emblem: Emblem, side: int, rng: np.random.Generator) -> Tile:
    """Draw an emblem, a little turned and with colours a little off.

    Args:
        emblem: what to draw.
        side: the longer side of the drawing, in pixels, before it is turned and cropped.
        rng: source of the turn and of the colours' offset.
    """
    angle = float(rng.uniform(-12, 12))
    offset = rng.integers(-14, 15, size=3)
    layers = _person_layers(emblem, side) if emblem.coarse == "person" else _badge_layers(emblem, side)
    turned = [_turn(layer, side, angle) for layer in layers]
    drawing = turned[0]
    for layer in turned[1:]:
        drawing = Image.alpha_composite(drawing, layer)
    pixels = np.asarray(drawing)
    mask = pixels[..., 3] > 127
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    colors = np.clip(pixels[..., :3].astype(np.int16) + offset, 0, 255).astype(np.uint8)
    parts = _visible_parts([np.asarray(layer)[..., 3] > 127 for layer in turned])
    return Tile(colors[crop], mask[crop], tuple(part[crop] for part in parts))


def draw_distractor(side: int, rng: np.random.Generator) -> Tile:
    """Draw a badge in greys and pastels that belongs to no entity."""
    canvas, draw = _canvas(side)
    extent = side * _SUPERSAMPLING
    sides = int(rng.integers(3, 9))
    grey = int(rng.integers(60, 200))
    _polygon(draw, extent, 0.48, (sides, float(rng.uniform(0, 360))), (grey, grey, grey))
    red, green, blue = (int(value) for value in rng.integers(150, 235, size=3))
    _polygon(draw, extent, 0.3, (int(rng.integers(3, 9)), float(rng.uniform(0, 360))), (red, green, blue))
    pixels = np.asarray(_turn(canvas, side, 0.0))
    return Tile(pixels[..., :3], pixels[..., 3] > 127, ())


def _badge_layers(emblem: Emblem, side: int) -> list[Image.Image]:
    canvas, draw = _canvas(side)
    extent = side * _SUPERSAMPLING
    index = FMNERG.tree[emblem.coarse].index(emblem.fine)
    silhouette = _SILHOUETTES[index % len(_SILHOUETTES)]
    fill = _FILL_COLORS[(index + 2 * emblem.variant) % len(_FILL_COLORS)]
    _shape(draw, extent, 0.49, silhouette, _FRAME_COLORS[emblem.coarse])
    _shape(draw, extent, 0.34, silhouette, fill)
    low, high = extent * 0.41, extent * 0.59
    if emblem.variant:
        draw.rectangle((low, low, high, high), fill=(20, 20, 20))
    else:
        draw.ellipse((low, low, high, high), fill=_FRAME_COLORS[emblem.coarse])
    return [canvas]


def _person_layers(emblem: Emblem, side: int) -> list[Image.Image]:
    """Body and head, each a layer, so that the parts have masks of their own."""
    extent = side * _SUPERSAMPLING
    body_color = _BODY_COLORS[list(_NAMES).index(emblem.fine)]
    body, draw = _canvas(side)
    draw.rounded_rectangle(
        (extent * 0.14, extent * 0.42, extent * 0.86, extent * 0.99), radius=extent * 0.16, fill=body_color
    )
    draw.rectangle((extent * 0.42, extent * 0.55, extent * 0.58, extent * 0.85), fill=(250, 250, 250))
    head, draw = _canvas(side)
    draw.ellipse((extent * 0.27, extent * 0.01, extent * 0.73, extent * 0.47), fill=_SKIN)
    draw.pieslice(
        (extent * 0.27, extent * 0.01, extent * 0.73, extent * 0.47), 180, 360, fill=_HAIR_COLORS[emblem.variant]
    )
    return [body, head]


def _visible_parts(layers: list[np.ndarray]) -> list[np.ndarray]:
    """What is left of each layer under the later ones; nothing for a drawing of one layer, which has no parts."""
    if len(layers) == 1:
        return []
    return [
        layer & ~np.any(layers[position + 1 :], axis=0) if layers[position + 1 :] else layer
        for position, layer in enumerate(layers)
    ]


def _canvas(side: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGBA", (side * _SUPERSAMPLING,) * 2, (0, 0, 0, 0))
    return canvas, ImageDraw.Draw(canvas)


def _turn(layer: Image.Image, side: int, angle: float) -> Image.Image:
    turned = layer.rotate(angle, resample=Image.Resampling.BILINEAR) if angle else layer
    return turned.resize((side, side), Image.Resampling.BOX)


def _shape(
    draw: ImageDraw.ImageDraw, extent: int, radius: float, silhouette: tuple[int, float] | str, color: Color
) -> None:
    if silhouette == "disc":
        low, high = extent * (0.5 - radius), extent * (0.5 + radius)
        draw.ellipse((low, low, high, high), fill=color)
    elif silhouette == "star":
        draw.polygon(_corners(extent, [radius, radius * 0.5] * 5, -90), fill=color)
    else:
        assert not isinstance(silhouette, str)
        _polygon(draw, extent, radius, silhouette, color)


def _polygon(
    draw: ImageDraw.ImageDraw, extent: int, radius: float, sides_and_start: tuple[int, float], color: Color
) -> None:
    sides, start = sides_and_start
    draw.polygon(_corners(extent, [radius] * sides, start), fill=color)


def _corners(extent: int, radii: list[float], start: float) -> list[tuple[float, float]]:
    turns = [math.radians(start + 360 * position / len(radii)) for position in range(len(radii))]
    return [
        (extent * (0.5 + radius * math.cos(turn)), extent * (0.5 + radius * math.sin(turn)))
        for radius, turn in zip(radii, turns, strict=True)
    ]
