"""Tables of the documentation have the figures of the files that they are linked to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def figures(name: str) -> Any:
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def load() -> Iterator[str]:
    for clients, found in figures("benchmarks/load-compare")["clients"].items():
        times = (f"{1000 * found['latency_s']['200'][at]:.0f} ms" for at in ("p50", "p99"))
        yield row(clients, f"{found['annotated_per_second']:.1f}", *times)


def health() -> Iterator[str]:
    for found in figures("benchmarks/load-health").values():
        yield row(*(f"{1000 * found[at]:.0f} ms" for at in ("p50", "p99", "max")))[1:]


def clusters() -> Iterator[str]:
    for found in figures("benchmarks/planned-clusters").values():
        planned, measured = (f"{found[f'{what}_seconds']:.0f} s" for what in ("planned", "measured"))
        low, high = (f"{seconds:,.0f}" for seconds in found["range_without_a_probe_seconds"])
        yield row(planned, measured, f"{found['planned_to_measured']:.2f}", f"{low} to {high} s")[1:]


def grounding() -> Iterator[str]:
    for variant, found in figures("benchmarks/grounding").items():
        label = f"{variant} ({found['mentions']})" if "category" in variant else variant
        yield row(label, *(percent(found[name]) for name in ("eeg", "small", "large", "groundable", "mean_iou")))


def decoding() -> Iterator[str]:
    found = figures("benchmarks/decoding")
    kinds = ("WEBP", "PNG", "TIFF", "AVIF", "GIF", "JPEG")
    yield row("side, pixels", *(f"{found['bulk'][kind]['side']:,}" for kind in kinds))
    for where in ("bulk", "online"):
        for at_once in ("1", "32"):
            yield row(*(f"{found[where][kind][f'{at_once}_at_once_mib']:,}" for kind in kinds))[1:]


def reranker_on_a_gpu() -> Iterator[str]:
    curve = [each for each in figures("benchmarks/reranker-gpu")["curve"] if each["batch_size"] in (1, 4, 16, 64)]
    yield "".join(f" {each['entities_per_second']:.0f} |" for each in curve)
    yield "".join(f" {percent(each['share_of_peak'], 0)} % |" for each in curve)
    yield "".join(f" {each['peak_memory_gb']:.1f} |" for each in curve)


def grounder_on_a_cpu() -> Iterator[str]:
    found = figures("benchmarks/grounder")
    for part, plain, shared in (("match_trace", 2, 2), ("end_to_end", 3, 2)):
        speeds = found[part]
        rates = f"{speeds['plain_entities_per_second']:.{plain}f}", f"{speeds['shared_entities_per_second']:.{shared}f}"
        yield row(*rates, f"{speeds['ratio']:.1f}")[1:]


def grounder_on_a_gpu() -> Iterator[str]:
    found = figures("benchmarks/grounder-gpu")
    for part, batches in (("match_trace", (1, 16, 64, 128, 256)), ("sam_encoder", (1, 2, 8, 32))):
        for each in found[part]:
            if each["batch"] in batches:
                speeds = f"{each['images_per_second']:.0f}", f"{each['entities_per_second']:,.0f}"
                share = f"{percent(each['share_of_peak'], 0)} %"
                yield row(each["batch"], *speeds, share, f"{each['memory_gb']:.1f}")[1:-1]


def demo() -> Iterator[str]:
    unseen, known = (figures(f"benchmarks/demo-500-seed-7{name}") for name in ("-unseen-names", ""))
    for scores in (unseen["known names"], unseen["all mentions"], known["all mentions"]):
        for found in scores.values():
            f1 = [found[task]["f1"] for task in ("mner", "eeg", "mnerg", "small", "large")]
            yield row(*(percent(share) if share else "0" for share in f1))[1:]


def reviews() -> Iterator[str]:
    found = figures("benchmarks/review")
    for posts, tasks in found["coverage"]["uncertainty"].items():
        measures = [tasks["mner"][name] for name in ("f1", "precision")]
        cells = ((f"{percent(each['coverage'])} %", percent(each["half_width"])) for each in measures)
        yield row(posts, *(cell for pair in cells for cell in pair))
    for posts, measures in found["same_width"].items():
        needed = [measures[name]["posts"] for name in ("f1", "precision", "recall")]
        yield row(f"{posts} posts", *(f"{each} ({100 * each / int(posts):.0f} %)" for each in needed))


def confidence() -> Iterator[str]:
    found = figures("benchmarks/confidence")
    kinds, scores = (found["without_knowledge"], found["with_knowledge"]), ("score", "marginal", "confidence")
    yield row(*(f"{kind['entities']:,}, {percent(kind['right'])} %" for kind in kinds))[1:]
    for measure in ("auc", "ece"):
        yield row(*(", ".join(f"{kind[score][measure]:.3f}"[1:] for score in scores) for kind in kinds))[1:]
    yield row(*(f"**{percent(kind['promised']['0.9']['share'], 0)} %**" for kind in kinds))[1:]
    broken = ([kind["promised"][each]["resamplings"]["broken"] for each in ("0.9", "0.95")] for kind in kinds)
    yield row(*(", ".join(f"{percent(share)} %" for share in shares) for shares in broken))[1:]


def grounder_confidence() -> Iterator[str]:
    seen, box = (figures("benchmarks/confidence")["grounder"][what] for what in ("seen", "box"))
    for found, before, after in ((seen, "match_score", "seen_probability"), (box, "box_score", "box_confidence")):
        cells = [
            f"{found[each][measure]:.3f}"[1:]
            for each in (before, after, "of_other_names")
            for measure in ("ece", "auc")
        ]
        yield row(*cells[:2])[1:]
        yield row(*cells[2:])[1:]


def throughput() -> Iterator[str]:
    slower, faster = (figures(f"benchmarks/throughput{name}") for name in ("", "-faster-cores"))
    yield row("the plain way", *(f"{each['plain_posts_per_second']:.1f}" for each in (slower, faster)))
    for found, remark in ((slower, " the plain way"), (faster, "")):
        yield f" {found['pipeline_posts_per_second']:.1f} ({found['ratio_to_plain']:.1f} ×{remark}) |"
    yield row(*(f"{each['in_process_posts_per_second']['a_thread_a_core']:.1f}" for each in (slower, faster)))[1:]


def experiments() -> Iterator[str]:
    rows, columns = figures("experiments/tagger/results")["rows"], ("fine, without knowledge", "fine, with knowledge")
    for name in ("all on", "one path (w/o MGP)", "no M (w/o MGA)", "no CRF"):
        yield row(name, *(mean(rows[name][column]) for column in columns))
    spans = figures("experiments/table5/results")["rows"]
    for labels in ("GMNER", "FMNERG"):
        yield row(labels, *(mean(spans[source][f"{labels} F1"]) for source in ("none", "caption", "knowledge", "both")))
    parts = figures("experiments/generated/figure3/results")["rows"]
    for label, name in (("all on", "GEM"), ("w/o reranker", "w/o CR"), ("w/o coarse path", "w/o MGP")):
        yield f"| {label} | {mean(parts[name]['fine F1'])} |"


def mean(cell: dict[str, float]) -> str:
    return f"{percent(cell['mean'])} ± {percent(cell['deviation'])}"


TABLES = {
    "online.md": [load, health],
    "bulk.md": [clusters],
    "grounding.md": [grounding, grounder_on_a_cpu, grounder_on_a_gpu],
    "input.md": [decoding],
    "results.md": [reranker_on_a_gpu, throughput, grounder_confidence],
    "confidence.md": [confidence],
    "nano.md": [demo],
    "review.md": [reviews],
    "experiments.md": [experiments],
}


@pytest.mark.parametrize(
    ("page", "table"),
    [pytest.param(page, table, id=table.__name__) for page, tables in TABLES.items() for table in tables],
)
def test_a_table_has_the_figures_of_its_file(page, table):
    text = (DOCS / page).read_text(encoding="utf-8")
    expected = [*table()]
    assert expected
    assert [each for each in expected if each not in text] == []
