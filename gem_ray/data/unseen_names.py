"""Names that no training post of the generated corpus has, written as people write names in tweets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gem_ray.data.emblems import EMBLEMS, Emblem

_ROOTS = (
    "Abberwick", "Brannock", "Caldrith", "Dunmarrow", "Eskavale", "Farlowen", "Gelbrook", "Harkwell", "Istorvane",
    "Juniferra", "Kelwick", "Lorrimer", "Mossgrave", "Navarrin", "Penhollow", "Quorrabel", "Ravensby",
    "Solmere", "Tavistone", "Umberlin", "Veldmoor", "Wyncastle", "Yarrowby", "Zelmira",
)  # fmt: skip
_FIRST_NAMES = ("Anika", "Bram", "Dalia", "Emeric", "Freya", "Goran", "Hollis", "Imke", "Keiko", "Leandro", "Odalys")

# Fine category -> its names; `{}` stands for a root.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "sports_team": ("{} Hawks", "{} Wanderers", "{}"),
    "company": ("{} Systems", "{} Holdings", "{}"),
    "band": ("The {} Sisters", "{} Parade", "{}"),
    "educational_institution": ("{} University", "{} College", "University of {}"),
    "city": ("{}", "New {}", "{} Springs"),
    "country": ("{}", "Republic of {}", "{} Islands"),
    "park": ("{} Gardens", "{} Forest Park", "{} Common"),
    "sports_facility": ("{} Stadium", "{} Park Oval", "The {} Dome"),
    "cultural_place": ("{} Gallery", "{} Opera House", "{} Library"),
    "film_and_television_works": ("Return to {}", "{} Nights", "The Last of {}"),
    "music": ("{} Lullaby", "Dancing in {}", "{}"),
    "written_work": ("The {} Letters", "A House in {}", "{} Chronicles"),
    "festival": ("{} Fest", "{} Sound Weekend", "{}"),
    "sports_event": ("{} Open", "{} Marathon", "{} Grand Prix"),
    "software": ("{}", "{} Studio", "{} Notes"),
    "game": ("{} Legends", "Rise of {}", "{} 2"),
    "brand_name_products": ("{} Fizz", "{} Crunch", "{} Pro Max"),
    "animal": ("{}", "Sir {}", "Little {}"),
    "website": ("{}", "{} Daily", "{} Market"),
}
_P_LOWER, _P_UPPER, _P_TYPO = 0.15, 0.1, 0.1
_KNOWN = frozenset(surface for emblem in EMBLEMS for surface in emblem.surfaces)


class UnseenNames:
    """Gives some of a post's entities names that training never saw.

    Args:
        rng: of the post; not the one that draws the rest, which stays as it is without this.
        share: of the mentions that are renamed, 0 to 1.
    """

    def __init__(self, rng: np.random.Generator, share: float) -> None:
        self._rng = rng
        self._share = share

    def rename(self, emblem: Emblem) -> Emblem:
        """The emblem, or an entity of its category that no emblem stands for."""
        return replace(emblem, name=self._name(emblem)) if self._rng.random() < self._share else emblem

    def written(self, words: list[str]) -> list[str]:
        """A name's words as a hurried person writes them: sometimes in small or capital letters, or with a typo."""
        draw = self._rng.random()
        if draw < _P_LOWER:
            return [word.lower() for word in words]
        if draw < _P_LOWER + _P_UPPER:
            return [word.upper() for word in words]
        if draw < _P_LOWER + _P_UPPER + _P_TYPO:
            longest = max(range(len(words)), key=lambda position: len(words[position]))
            return [self._misspelt(word) if position == longest else word for position, word in enumerate(words)]
        return words

    def _name(self, emblem: Emblem) -> str:
        root = str(self._rng.choice(_ROOTS))
        if emblem.coarse == "person":
            return f"{self._rng.choice(_FIRST_NAMES)} {root}"
        return str(self._rng.choice(_PATTERNS[emblem.fine])).format(root)

    def _misspelt(self, word: str) -> str:
        """Two letters swapped, one left out, or one doubled; never the first."""
        at = int(self._rng.integers(1, len(word) - 1)) if len(word) > 2 else 0
        swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        return str(self._rng.choice([swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]]))


def is_unseen(name: str) -> bool:
    """Whether a mention's text is none of the names that training posts have."""
    return name not in _KNOWN
