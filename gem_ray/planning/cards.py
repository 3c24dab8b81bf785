"""GPUs: what their makers say of memory and speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gem_ray.config import ConfigError
from gem_ray.plurals import counted

GIB = 2**30
TERA = 10**12
GIGA = 10**9


@dataclass(frozen=True)
class Card:
    """A GPU, as its data sheet has it.

    Attributes:
        memory_gb: as it is sold.
        memory: bytes that torch sees of it (`total_memory`): less, by up to a tenth, for ECC and the driver.
        half: dense matrix FLOP/s in bfloat16 or float16 with float32 accumulation (half of the figure "with sparsity").
        single: FLOP/s in float32, which torch does not lower to TF32 unless told so.
        bandwidth: of its memory, bytes a second.
        source: where the figures are from.
        has_bfloat16: whether its matrix units know bfloat16; else it computes in that as in float32.
    """

    memory_gb: float
    memory: int
    half: float
    single: float
    bandwidth: float
    source: str
    has_bfloat16: bool = True

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in a dtype."""
        is_wide = dtype == "float32" or (dtype == "bfloat16" and not self.has_bfloat16)
        return self.single if is_wide else self.half


def _card(memory_gb: float, seen_gib: float, half: float, single: float, bandwidth: float, source: str) -> Card:
    return Card(memory_gb, int(seen_gib * GIB), half * TERA, single * TERA, bandwidth * GIGA, source)


@dataclass(frozen=True)
class ListPrice:
    """What an hour of a card costs on demand where `--price` does not say better, with the CPUs that come with it.

    Attributes:
        dollars: for an hour.
        source: provider, instance type and region, and where and when the price was read.
    """

    dollars: float
    source: str


def _aws(instance: str, dollars: float, cards: int, where: str) -> ListPrice:
    return ListPrice(dollars / cards, f"AWS {instance}, {counted(cards, 'card')}, on demand in us-east-1, {where}")


# Prices change, differ by region, and other providers ask half: these are assumptions, and are printed as such. Cards
# that no large provider rents out have none.
_SKYPILOT = "SkyPilot's copy of AWS's price list, undated (skypilot-org/skypilot-catalog, {}/aws/vms.csv)"
_V8, _V9 = _SKYPILOT.format("00148f2, v8"), _SKYPILOT.format("3e9a175, v9")
_RECEIPTS = "read on 2026-11-09 (datareceipts/data-receipts, 109-gpu-pricing)"
LIST_PRICES = {
    "t4": _aws("g4dn.xlarge", 0.526, 1, _V8),
    "a10g": _aws("g5.xlarge", 1.006, 1, _V9),
    "l4": _aws("g6.xlarge", 0.8048, 1, _V8),
    "l40s": _aws("g6e.xlarge", 1.861, 1, _V8),
    "a100-40gb": _aws("p4d.24xlarge", 21.957642, 8, _RECEIPTS),
    "a100-80gb": _aws("p4de.24xlarge", 27.44705, 8, _RECEIPTS),
    "h100": _aws("p5.48xlarge", 55.04, 8, _RECEIPTS),
    "h200": _aws("p5en.48xlarge", 63.296, 8, "listed on 2026-08-06 (dstackai/dstack, pull request 4110)"),
}

# Where only the memory is given, the first card with it is assumed: the slowest one that has a list price. What torch
# sees of a card is the H200's in docs/benchmarks, and the least that messages of "out of memory" gave for the others.
CARDS = {
    "t4": replace(_card(16, 14.56, 65, 8.1, 320, "NVIDIA T4 data sheet"), has_bfloat16=False),
    "a10g": _card(24, 22.06, 70, 35, 600, "NVIDIA A10G data sheet for AWS"),
    "rtx-4090": _card(24, 23.52, 165.2, 82.6, 1008, "NVIDIA Ada GPU architecture white paper"),
    "rtx-3090": _card(24, 23.7, 71, 35.6, 936, "NVIDIA Ampere GA102 white paper"),
    "l4": _card(24, 22.03, 121, 30.3, 300, "NVIDIA L4 data sheet"),
    "a100-40gb": _card(40, 39.38, 312, 19.5, 1555, "NVIDIA A100 data sheet, SXM"),
    "l40s": _card(48, 44.4, 362, 91.6, 864, "NVIDIA L40S data sheet"),
    "a100-80gb": _card(80, 79.14, 312, 19.5, 2039, "NVIDIA A100 data sheet, SXM"),
    "h100": _card(80, 79.1, 989, 67, 3350, "NVIDIA H100 data sheet, SXM"),
    "h200": _card(141, 139.8, 989, 67, 4800, "NVIDIA H200 data sheet, SXM"),
    "b200": _card(180, 178.35, 2250, 75, 7700, "NVIDIA HGX B200 data sheet"),
}


def find_card(name: str | None, memory_gb: float | None) -> tuple[str | None, Card | None]:
    """The card of a name or a description, or the first one with a memory; neither where no card has it.

    Args:
        name: of `CARDS`, or `name:memory=24,tflops=165`, with `bandwidth=1008` in GB/s if it is known.
        memory_gb: of a card without a name.

    Raises:
        ConfigError: an unknown name, or a description without memory and speed, or with sizes that no card has.
    """
    if name is None:
        known = next((each for each, card in CARDS.items() if card.memory_gb == memory_gb), None)
        return known, CARDS[known] if known else None
    short, is_described, description = name.partition(":")
    if is_described and short:
        return short, _described(name, description)
    if (known := name.lower()) not in CARDS:
        raise ConfigError(
            f"no such card {name!r}; expected one of {', '.join(CARDS)}, or {name}:memory=24,tflops=165 with its "
            "memory in GB and its dense TFLOP/s in half precision"
        )
    return known, CARDS[known]


def _described(name: str, description: str) -> Card:
    """A card of the user's own. In float32 half of its speed is assumed, and a byte for 165 operations."""
    pairs = [part.partition("=") for part in description.split(",")]
    try:
        values = {key: float(value) for key, _, value in pairs}
    except ValueError:
        values = {}
    if len(values) < len(pairs) or not {"memory", "tflops"} <= values.keys():
        raise ConfigError(f"--card takes name:memory=24,tflops=165, not {name!r}")
    if unknown := values.keys() - {"memory", "tflops", "bandwidth"}:
        raise ConfigError(f"--card knows memory, tflops and bandwidth, not {', '.join(sorted(unknown))}")
    for key, value in values.items():
        _check_size(f"--card {name}: {key}", value)
    memory, half = values["memory"], values["tflops"]
    return _card(memory, memory, half, half / 2, values.get("bandwidth", half / 165 * 1000), "as given")


def _check_size(what: str, value: float) -> None:
    if not _LEAST <= value <= _MOST:  # nan neither
        raise ConfigError(f"{what} must be a number from {_LEAST:g} to {_MOST:,.0f}, not {value:g}")


@dataclass(frozen=True)
class Fleet:
    """The cards of a plan, of one kind or of several. Ray puts an actor on any of them.

    Attributes:
        kinds: how many there are, their name, and what is known of their speed (`None`: nothing).
        memory_gb: of the smallest, as it is sold.
        memory: of it, bytes: what an actor must fit on.
        is_assumed: whether only the memory was given, and the kind was chosen by it.
    """

    kinds: tuple[tuple[int, str | None, Card | None], ...] = ()
    memory_gb: float = 0.0
    memory: int = 0
    is_assumed: bool = False

    @classmethod
    def parse(cls, gpus: str | int, memory_gb: float | None, card: str | None) -> Fleet:
        """`8` cards of a memory or a name; or `8xl40s+4xa10g`.

        Raises:
            ConfigError: neither a number nor a list of cards, cards that are not known, or cards that are described
                twice.
        """
        if memory_gb is not None:
            _check_size("--gpu-memory", memory_gb)
        described = " and ".join(["--card"] * (card is not None) + ["--gpu-memory"] * (memory_gb is not None))
        if str(gpus) == "0":
            if described:
                raise ConfigError(f"{described} without GPUs: give their number with --gpus")
            return cls()
        if count := _count(str(gpus)):
            name, facts = find_card(card, memory_gb or _USUAL_MEMORY_GB)
            sold = memory_gb or (facts.memory_gb if facts else _USUAL_MEMORY_GB)
            memory = facts.memory if facts and facts.memory_gb == sold else int(sold * GIB)
            return cls(((count, name, facts),), sold, memory, is_assumed=card is None)
        kinds: list[tuple[int, str | None, Card | None]] = []
        for part in str(gpus).split("+"):
            number, times, name = part.partition("x")
            if not (count := _count(number)) or not (times and name):
                raise ConfigError(f"--gpus takes 8, or 8xl40s+4xa10g, not {gpus!r}")
            kinds.append((count, *find_card(name, None)))
        if described:
            raise ConfigError(f"{described}: --gpus {gpus} says already which cards there are")
        smallest = min((facts for _, _, facts in kinds if facts), key=lambda facts: facts.memory)
        return cls(tuple(kinds), smallest.memory_gb, smallest.memory)

    @property
    def count(self) -> int:
        """Cards of all kinds."""
        return sum(count for count, _, _ in self.kinds)

    @property
    def name(self) -> str | None:
        """Of the kind, or of all kinds with their numbers; `None` if one is not known."""
        if len(self.kinds) == 1:
            return self.kinds[0][1]
        return "+".join(f"{count}x{name}" for count, name, _ in self.kinds) or None

    def seconds(self, need: Callable[[Card], float]) -> float | None:
        """Of an average card for something that is shared out over all of them; `None` if a speed is not known."""
        if not self.kinds or any(card is None for _, _, card in self.kinds):
            return None
        times = [(count, need(card)) for count, _, card in self.kinds if card is not None]
        if any(not seconds for _, seconds in times):
            return 0.0
        return self.count / sum(count / seconds for count, seconds in times)

    @property
    def list_price(self) -> ListPrice | None:
        """For an hour of all cards; `None` if one has no list price."""
        prices = [LIST_PRICES.get(name or "") for _, name, _ in self.kinds]
        known = [(count, price) for (count, _, _), price in zip(self.kinds, prices, strict=True) if price is not None]
        if not known or len(known) < len(prices):
            return None
        sources = dict.fromkeys(price.source for _, price in known)
        return ListPrice(sum(count * price.dollars for count, price in known), "; ".join(sources))

    def with_one_more(self) -> Fleet:
        """And another card of the first kind."""
        (count, name, card), *others = self.kinds
        return replace(self, kinds=((count + 1, name, card), *others))


def _count(text: str) -> int:
    """A number of cards; 0 if it is none."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else 0


_USUAL_MEMORY_GB = 24.0
_LEAST, _MOST = 0.1, 1e6  # GB, TFLOP/s and GB/s of any card
_MOST_DIGITS = 6
