"""GPUs: what their makers say of memory and speed."""

from __future__ import annotations

from dataclasses import dataclass

from gem_ray.config import ConfigError

GIB = 2**30
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True)
class Card:
    """A GPU, as its data sheet has it.

    Attributes:
        memory_gb: as it is sold; these gigabytes have 2³⁰ bytes.
        half: dense matrix FLOP/s in bfloat16 or float16 with float32 accumulation (half of the figure "with sparsity").
        single: FLOP/s in float32, which torch does not lower to TF32 unless told so.
        bandwidth: of its memory, bytes a second.
        source: where the figures are from.
    """

    memory_gb: int
    half: float
    single: float
    bandwidth: float
    source: str

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in a dtype."""
        return self.single if dtype == "float32" else self.half


def _card(memory_gb: int, half: float, single: float, bandwidth: float, source: str) -> Card:
    return Card(memory_gb, half * TERA, single * TERA, bandwidth * GIGA, source)


# Of cards with the same memory, the first one is assumed when only the memory is given.
CARDS = {
    "t4": _card(16, 65, 8.1, 320, "NVIDIA T4 data sheet"),
    "rtx-4090": _card(24, 165.2, 82.6, 1008, "NVIDIA Ada GPU architecture white paper"),
    "a10g": _card(24, 70, 35, 600, "NVIDIA A10G data sheet for AWS"),
    "l4": _card(24, 121, 30.3, 300, "NVIDIA L4 data sheet"),
    "a100-40gb": _card(40, 312, 19.5, 1555, "NVIDIA A100 data sheet, SXM"),
    "l40s": _card(48, 362, 91.6, 864, "NVIDIA L40S data sheet"),
    "a100-80gb": _card(80, 312, 19.5, 2039, "NVIDIA A100 data sheet, SXM"),
    "h100": _card(80, 989, 67, 3350, "NVIDIA H100 data sheet, SXM"),
    "h200": _card(141, 989, 67, 4800, "NVIDIA H200 data sheet, SXM"),
}


def find_card(name: str | None, memory_gb: float | None) -> tuple[str | None, Card | None]:
    """The card of a name, or the first one with a memory; neither where no card has it.

    Raises:
        ConfigError: an unknown name.
    """
    if name is not None and name not in CARDS:
        raise ConfigError(f"--card: no such card {name!r}; expected one of {', '.join(CARDS)}")
    known = name or next((each for each, card in CARDS.items() if card.memory_gb == memory_gb), None)
    return known, CARDS[known] if known else None
