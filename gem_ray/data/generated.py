"""The generated corpus: posts about invented entities, with gold spans, categories and boxes.

Every post is a pure function of (seed, index), so a longer corpus begins with the shorter one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gem_ray.data.emblems import EMBLEMS, Emblem, Tile, draw_distractor, draw_emblem
from gem_ray.data.phrases import CLOSINGS, CUES, NEUTRAL, NO_ENTITY, OPENINGS, TAGS, USERS
from gem_ray.data.unseen_names import UnseenNames
from gem_ray.records import Box, GoldEntity, Post

IMAGE_SIZES = ((256, 256), (288, 216), (216, 288), (320, 240), (240, 320))
"""Width and height of images, in pixels."""
_SMALL, _LARGE = 1 / 50, 1 / 2  # shares of the image's area, as the evaluation cuts them

# Shares of the corpus.
_P_NO_ENTITY = 0.08
_P_UNSEEN = 0.3  # a mention that is not in the image
_P_OTHER_SENSE = 0.08  # an unseen mention whose namesake is in the image
_P_BARE = 0.7  # an ambiguous mention that is seen, in a context that fits both its senses
_P_REPEATED = 0.08  # a post that mentions an entity twice
_P_TWO_INSTANCES = 0.06  # a scene that shows an emblem twice
_P_HASHTAG = 0.15  # a mention written as a hashtag
_P_SMALL, _P_LARGE = 0.16, 0.14


@dataclass(frozen=True)
class PlacedEmblem:
    """An emblem in a scene: `mask` and each of `parts` are `(H, W)` bool, `box` is the mask's tight box in pixels."""

    emblem: Emblem
    box: Box
    mask: np.ndarray
    parts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Scene:
    """An image, `(H, W, 3)` uint8 RGB, and the emblems in it."""

    pixels: np.ndarray
    instances: tuple[PlacedEmblem, ...]

    def boxes_of(self, emblem: Emblem) -> tuple[Box, ...]:
        """Where an entity is seen; empty if it is not."""
        return tuple(instance.box for instance in self.instances if instance.emblem == emblem)


def generate(count: int, seed: int, unseen_names: float = 0.0) -> Iterator[Post]:
    """Posts with text, tokens, an encoded image and gold mentions.

    Args:
        count: how many.
        seed: 0 to 2³² − 1; other seeds give other posts about the same entities.
        unseen_names: share of the mentioned entities, 0 to 1, that are others: of names that training posts never have,
            misspelt as in tweets, and never in the image. For scoring only.
    """
    for index in range(count):
        unseen = UnseenNames(np.random.default_rng([seed, index, 1]), unseen_names) if unseen_names else None
        yield make_post(np.random.default_rng([seed, index]), f"gen-{seed}-{index:06d}", unseen)


def make_post(rng: np.random.Generator, post_id: str, unseen: UnseenNames | None = None) -> Post:
    """One post: what it mentions, the scene, and the text around the mentions."""
    mentioned = [] if rng.random() < _P_NO_ENTITY else _pick_mentioned(rng)
    if unseen:
        mentioned = list({emblem.name: emblem for emblem in map(unseen.rename, mentioned)}.values())
    seen = [emblem for emblem in mentioned if rng.random() > _P_UNSEEN and emblem in EMBLEMS]
    shown = [*seen, *_pick_bystanders(rng, mentioned, seen)]
    scene = make_scene(rng, shown)
    tokens, spans = _write(rng, mentioned, seen, unseen)
    text, _ = _join(tokens)
    boxes = {emblem.name: scene.boxes_of(emblem) for emblem in mentioned}
    gold = [GoldEntity(start, end, emblem.fine, boxes[emblem.name]) for start, end, emblem in spans]
    return Post(post_id=post_id, text=text, tokens=tokens, image_bytes=_encode(rng, scene.pixels), gold=gold)


def make_scene(rng: np.random.Generator, emblems: Sequence[Emblem]) -> Scene:
    """A cluttered background, some distractors and the given emblems at random places and sizes, none over another.

    About one emblem in six covers less than 1/50 of the image; of those placed first, one in ten covers more than half.
    An emblem for which no place is found, even made smaller, is left out.
    """
    width, height = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    pixels = _background(rng, width, height)
    taken: list[Box] = []
    for side in rng.integers(20, 70, size=rng.integers(0, 4)):
        _place(rng, pixels, draw_distractor(int(side), rng), taken)
    placed: list[PlacedEmblem] = []
    repeated = [emblems[0]] if emblems and rng.random() < _P_TWO_INSTANCES else []
    taken = []  # emblems may cover distractors, not each other
    for emblem in (*emblems, *repeated):
        side = _side(rng, width, height, first=not placed)
        while side >= 24:
            tile = draw_emblem(emblem, side, rng)
            box = _place(rng, pixels, tile, taken)
            if box is not None:
                placed.append(_instance(emblem, tile, box, width, height))
                break
            side = side * 2 // 3
    return Scene(_add_noise(rng, pixels), tuple(placed))


def _pick_mentioned(rng: np.random.Generator) -> list[Emblem]:
    """One to four entities, no two of one name."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.45, 0.33, 0.16, 0.06]))
    picked: dict[str, Emblem] = {}
    while len(picked) < count:
        emblem = EMBLEMS[rng.integers(len(EMBLEMS))]
        picked.setdefault(emblem.name, emblem)
    return list(picked.values())


def _pick_bystanders(rng: np.random.Generator, mentioned: list[Emblem], seen: list[Emblem]) -> list[Emblem]:
    """Emblems in the image that the text does not mean: sometimes the namesake of an unseen mention."""
    names = {emblem.name for emblem in mentioned}
    bystanders = [
        other
        for emblem in mentioned
        if emblem not in seen and rng.random() < _P_OTHER_SENSE / _P_UNSEEN
        for other in EMBLEMS
        if other.name == emblem.name and other != emblem
    ]
    for _ in range(int(rng.choice([0, 1, 2], p=[0.55, 0.3, 0.15]))):
        other = EMBLEMS[rng.integers(len(EMBLEMS))]
        if other.name not in names and other not in bystanders:
            bystanders.append(other)
    return bystanders


def _write(
    rng: np.random.Generator, mentioned: list[Emblem], seen: list[Emblem], unseen: UnseenNames | None
) -> tuple[list[str], list[tuple[int, int, Emblem]]]:
    """The post's tokens, and the mentions as half-open word intervals."""
    tokens: list[str] = list(_choose(rng, OPENINGS)) if rng.random() < 0.35 else []
    spans: list[tuple[int, int, Emblem]] = []
    order = [*mentioned, mentioned[0]] if mentioned and rng.random() < _P_REPEATED else list(mentioned)
    if not order:
        tokens += _choose(rng, NO_ENTITY)
    # Mentions of one text get the same boxes, so an entity is written in one form throughout a post.
    forms = {emblem.name: _surface(rng, emblem) for emblem in order}
    if unseen:
        for emblem in mentioned:
            if emblem not in EMBLEMS:
                prefix, name = forms[emblem.name]
                forms[emblem.name] = prefix, unseen.written(name)
    for position, emblem in enumerate(order):
        if position:
            tokens.append(str(rng.choice([".", "!", ",", "and", "…", "—"])))
        bare = emblem in seen and rng.random() < (_P_BARE if emblem.is_ambiguous else 0.5)
        for word in _choose(rng, NEUTRAL if bare else CUES[emblem.fine]):
            if word == "{e}":
                prefix, name = forms[emblem.name]
                tokens += prefix
                spans.append((len(tokens), len(tokens) + len(name), emblem))
                tokens += name
            else:
                tokens.append(word)
    return tokens + _ending(rng), spans


def _surface(rng: np.random.Generator, emblem: Emblem) -> tuple[list[str], list[str]]:
    """What stands before the name, and the name's words."""
    if rng.random() < _P_HASHTAG:
        return ["#"], [emblem.surfaces[-1]]
    return [], emblem.name.split()


def _ending(rng: np.random.Generator) -> list[str]:
    ending = list(_choose(rng, CLOSINGS)) if rng.random() < 0.6 else []
    for _ in range(int(rng.choice([0, 1, 2], p=[0.6, 0.28, 0.12]))):
        ending += ["#", str(rng.choice(TAGS))]
    if rng.random() < 0.15:
        ending += ["via", "@", str(rng.choice(USERS))]
    if rng.random() < 0.25:
        letters = "".join(rng.choice(list("abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ0123456789"), size=10))
        ending.append(f"http://t.co/{letters}")
    return ending


def _join(tokens: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Text as people write it: no space before closing punctuation, none after `#` and `@`; and the tokens' offsets."""
    text, offsets = "", []
    for position, token in enumerate(tokens):
        glued = token in (".", "!", ",", "?", "…", ":", ")") or (
            position > 0 and tokens[position - 1] in ("#", "@", "(")
        )
        if text and not glued:
            text += " "
        offsets.append((len(text), len(text) + len(token)))
        text += token
    return text, offsets


def _side(rng: np.random.Generator, width: int, height: int, first: bool) -> int:
    """The longer side of an emblem. A badge's silhouette fills most of its square; the bounds allow for that."""
    draw = rng.random()
    if draw < _P_SMALL:
        return round(float(rng.uniform(0.78, 0.98)) * (width * height * _SMALL) ** 0.5)
    if draw > 1 - _P_LARGE and first:
        return min(width, height, round(float(rng.uniform(1.08, 1.4)) * (width * height * _LARGE) ** 0.5))
    return round(float(rng.uniform(0.17, 0.45)) * min(width, height))


def _place(rng: np.random.Generator, pixels: np.ndarray, tile: Tile, taken: list[Box]) -> Box | None:
    """Paste a tile where it covers nothing in `taken`, and remember its box; None if there is no such place."""
    height, width = pixels.shape[:2]
    tile_height, tile_width = tile.mask.shape
    if tile_height > height or tile_width > width:
        return None
    for _ in range(40):
        x, y = int(rng.integers(width - tile_width + 1)), int(rng.integers(height - tile_height + 1))
        box = Box(x, y, x + tile_width, y + tile_height)
        if all(box.iou(other) == 0 for other in taken):
            window = pixels[y : y + tile_height, x : x + tile_width]
            window[tile.mask] = tile.pixels[tile.mask]
            taken.append(box)
            return box
    return None


def _instance(emblem: Emblem, tile: Tile, box: Box, width: int, height: int) -> PlacedEmblem:
    def spread(small: np.ndarray) -> np.ndarray:
        full: np.ndarray = np.zeros((height, width), dtype=bool)
        full[int(box.y1) : int(box.y2), int(box.x1) : int(box.x2)] = small
        return full

    return PlacedEmblem(emblem, box, spread(tile.mask), tuple(spread(part) for part in tile.parts))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Soft patches of muted colour under lines, rectangles and ellipses."""
    tones = rng.integers(90, 200, size=(5, 6, 1)) + rng.integers(-35, 36, size=(5, 6, 3))
    patches = tones.astype(np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x1, y1 = int(rng.integers(width)), int(rng.integers(height))
        x2, y2 = x1 + int(rng.integers(4, 60)), y1 + int(rng.integers(4, 60))
        tone = int(rng.integers(50, 210))
        color = tuple(int(np.clip(tone + shift, 0, 255)) for shift in rng.integers(-25, 26, size=3))
        shape = rng.integers(3)
        if shape == 0:
            draw.line((x1, y1, x2, y2), fill=color, width=int(rng.integers(1, 5)))
        elif shape == 1:
            draw.rectangle((x1, y1, x2, y2), outline=color, width=2)
        else:
            draw.ellipse((x1, y1, x2, y2), fill=color)
    return np.array(image)


def _add_noise(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    noise = rng.normal(0, 7, size=pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _encode(rng: np.random.Generator, pixels: np.ndarray) -> bytes:
    """Mostly JPEG, as social networks serve; some PNG and WebP."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    draw = rng.random()
    if draw < 0.9:
        image.save(buffer, "JPEG", quality=int(rng.integers(75, 94)))
    elif draw < 0.95:
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def _choose(rng: np.random.Generator, phrases: Sequence[str]) -> list[str]:
    return phrases[int(rng.integers(len(phrases)))].split()
