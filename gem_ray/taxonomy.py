"""The category tree: 51 fine categories under 8 coarse ones (FMNERG), and GMNER's four."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

OUTSIDE = "O"

# Wang et al. 2023, FMNERG: coarse category -> its fine categories.
FMNERG_TREE: dict[str, tuple[str, ...]] = {
    "person": (
        "actor",
        "artist",
        "athlete",
        "author",
        "businessman",
        "character",
        "coach",
        "director",
        "intellectual",
        "journalist",
        "musician",
        "politician",
        "person_other",
    ),
    "organization": (
        "band",
        "company",
        "educational_institution",
        "government_agency",
        "news_agency",
        "political_party",
        "social_organization",
        "sports_league",
        "sports_team",
        "organization_other",
    ),
    "location": ("city", "continent", "country", "park", "road", "state", "location_other"),
    "building": ("cultural_place", "entertainment_place", "sports_facility", "building_other"),
    "art": ("film_and_television_works", "magazine", "music", "written_work", "art_other"),
    "event": ("festival", "sports_event", "event_other"),
    "product": ("brand_name_products", "game", "software", "product_other"),
    "other": ("animal", "award", "medical_thing", "ordinance", "website"),
}

# The exact map from FMNERG's coarse categories to GMNER's.
GMNER_OF_COARSE: dict[str, str] = {
    "person": "PER",
    "organization": "ORG",
    "location": "LOC",
    "building": "LOC",
    "art": "OTHER",
    "event": "OTHER",
    "product": "OTHER",
    "other": "OTHER",
}


@dataclass(frozen=True)
class LabelSet:
    """A two-level category tree and the BIO tags over it.

    Args:
        name: what configuration files call it.
        tree: coarse category -> its fine categories. A one-level set maps each category to itself.
    """

    name: str
    tree: dict[str, tuple[str, ...]]

    @cached_property
    def coarse(self) -> tuple[str, ...]:
        """Coarse categories, in the order of their indices."""
        return tuple(self.tree)

    @cached_property
    def fine(self) -> tuple[str, ...]:
        """Fine categories, in the order of their indices."""
        return tuple(fine for group in self.tree.values() for fine in group)

    @cached_property
    def parent(self) -> dict[str, str]:
        """Fine category -> its coarse category."""
        return {fine: coarse for coarse, group in self.tree.items() for fine in group}

    @cached_property
    def is_hierarchical(self) -> bool:
        """False when both levels are the same (GMNER): one path is enough."""
        return self.coarse != self.fine

    @cached_property
    def coarse_tags(self) -> tuple[str, ...]:
        """`O`, then `B-x`, `I-x` of every coarse category: 17 tags for FMNERG."""
        return bio_tags(self.coarse)

    @cached_property
    def fine_tags(self) -> tuple[str, ...]:
        """`O`, then `B-x`, `I-x` of every fine category: 103 tags for FMNERG."""
        return bio_tags(self.fine)

    def siblings(self, fine: str) -> tuple[str, ...]:
        """The other fine categories of the same coarse category."""
        return tuple(other for other in self.tree[self.parent[fine]] if other != fine)


def bio_tags(categories: tuple[str, ...]) -> tuple[str, ...]:
    """`O`, then `B-x`, `I-x` for each category: tag 1 + 2i opens category i, tag 2 + 2i continues it."""
    return (OUTSIDE, *(f"{prefix}-{name}" for name in categories for prefix in "BI"))


FMNERG = LabelSet("fmnerg", FMNERG_TREE)
GMNER = LabelSet("gmner", {name: (name,) for name in ("PER", "LOC", "ORG", "OTHER")})
LabelSetName = Literal["fmnerg", "gmner"]
LABEL_SETS: dict[str, LabelSet] = {labels.name: labels for labels in (FMNERG, GMNER)}


def gmner_category(fine: str) -> str:
    """GMNER's category of an FMNERG fine category.

    Raises:
        KeyError: `fine` is not one of the 51.
    """
    return GMNER_OF_COARSE[FMNERG.parent[fine]]


def decode_bio(tags: list[str]) -> list[tuple[int, int, str]]:
    """Spans of a BIO sequence. An `I-x` that does not continue an `x` opens a new one.

    Returns:
        `(start, end, category)` with half-open word intervals, in order.
    """
    spans: list[tuple[int, int, str]] = []
    start, category = 0, None
    for position, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, name = tag.partition("-")
        if category is not None and not (prefix == "I" and name == category):
            spans.append((start, position, category))
            category = None
        if category is None and prefix in ("B", "I"):
            start, category = position, name
    return spans


def encode_bio(spans: list[tuple[int, int, str]], length: int) -> list[str]:
    """The BIO sequence of non-overlapping `(start, end, category)` spans over `length` words."""
    tags = [OUTSIDE] * length
    for start, end, category in spans:
        tags[start] = f"B-{category}"
        tags[start + 1 : end] = [f"I-{category}"] * (end - start - 1)
    return tags
