"""What the embedded vision models know: the generated corpus, and nothing of the real world."""

from __future__ import annotations

from gem_ray.data.emblems import EMBLEMS
from gem_ray.data.generated import IMAGE_SIZES
from gem_ray.scope import Scope

# By name and size, not by category: a generated post whose category the tagger has missed is theirs all the same.
SCOPE = Scope(
    knows=f"the emblems of {len(EMBLEMS)} invented entities in generated images",
    names=tuple(dict.fromkeys(emblem.name for emblem in EMBLEMS)),
    image_sizes=IMAGE_SIZES,
)
