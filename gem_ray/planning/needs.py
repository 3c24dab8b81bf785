"""What a configuration loads: size, licence and place of each model, and copies for clusters without internet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ray import hub, model_paths
from gem_ray.config import Config, merge_trees
from gem_ray.data.files import open_filesystem, whole_file
from gem_ray.model_references import model_keys, reference_at
from gem_ray.planning.published import find_published
from gem_ray.stages import Key, active_stages

_BUFFER_BYTES = 2**24


@dataclass(frozen=True)
class ModelNeeded:
    """A model that a configuration names.

    Attributes:
        role: as in the output's `models` column.
        key: of the configuration.
        reference: what stands there.
        place: where it is: `with gem-ray`, `here`, `s3`, `hub cache`, or `missing`.
        size: bytes of the files that are loaded; `None` if not known.
        is_exact: whether the size was counted, not computed from what is published.
        licence: as its card or the published table says; `None` if not known.
        revision: the commit, of a model of the hub, if it is known.
        reason: why nothing more is known; `None` if all is well.
    """

    role: str
    key: Key
    reference: str
    place: str
    size: int | None = None
    is_exact: bool = True
    licence: str | None = None
    revision: str | None = None
    reason: str | None = None


def models_needed(config: Config) -> Iterator[ModelNeeded]:
    """Every model with files that the active stages load. Fetches no weights."""
    for role, key in model_keys(active_stages(config), config).items():
        reference = reference_at(config, key)
        assert reference is not None  # else it has no key
        yield _look_up(role, key, reference)


def fetch_models(config: Config, target: str | None, report: Callable[[str], None]) -> dict[str, Any]:
    """Fetch every model of a configuration: only the files that are loaded.

    Args:
        config: names the models.
        target: a folder or an `s3://` prefix that gets a copy of each model, named `org/name@commit`; `None` means
            this machine's cache, where they are loaded from.
        report: called with a line about each model.

    Returns:
        The sections of the configuration that use the copies.

    Raises:
        FileNotFoundError: a model is not there.
    """
    settings: dict[str, Any] = {}
    for need in models_needed(config):
        path = model_paths.resolve(need.reference)
        if target is None or not _is_copied(need, target):
            report(f"{need.role}: {need.reference} is {path}")
            continue
        copy = f"{target.rstrip('/')}/{_copy_name(need.reference)}"
        sent = _copy(path, copy)
        report(f"{need.role}: {need.reference} is at {copy} ({sent} bytes copied)")
        value: Any = copy
        for name in reversed(need.key):
            value = {name: value}
        settings = merge_trees(settings, value)
    return settings


def _look_up(role: str, key: Key, reference: str) -> ModelNeeded:
    published = find_published(reference)
    licence = published.licence if published else None
    if (path := model_paths.here(reference)) is not None:
        licence = "apache-2.0" if reference.startswith("nano:") else licence  # gem-ray's own
        place = "with gem-ray" if reference.startswith(("nano:", "package:")) else "here"
        return ModelNeeded(role, key, reference, place, sum(_files(path).values()), licence=licence)
    if reference.startswith("s3://"):
        return ModelNeeded(role, key, reference, "s3", model_paths.s3_size(reference), licence=licence)
    place = "hub cache" if model_paths.local(reference) is not None else "missing"
    try:
        model = hub.look_up(reference)
    except (FileNotFoundError, PermissionError) as error:
        size = published.size if published else None
        return ModelNeeded(role, key, reference, place, size, False, licence, reason=str(error))
    size, revision = sum(model.sizes.values()), model.reference.revision
    licence = licence or hub.licence(model)
    return ModelNeeded(role, key, reference, place, size, licence=licence, revision=revision)


def _is_copied(need: ModelNeeded, target: str) -> bool:
    """What every node has, or can read, stays where it is."""
    if target.startswith("s3://"):
        return need.place not in ("with gem-ray", "s3")
    return need.place not in ("with gem-ray", "here")


def _copy_name(reference: str) -> str:
    """A name that stands for this content, so that a copy is never overwritten by another."""
    described = model_paths.describe(reference)
    if hub.is_pinned(described):
        place = hub.HubReference.parse(described)
        folder = f"{place.repo}@{str(place.revision)[:12]}"
        return f"{folder}/{place.file}" if place.file else folder
    name, _, content = described.rpartition("@")
    stem = name.rstrip("/").rpartition("/")[2]
    return f"{content}/{stem}" if model_paths.resolve(reference).is_file() else f"{stem}@{content}"


def _files(path: Path) -> dict[str, int]:
    """The files of a local model that are loaded, with their bytes."""
    if path.is_file():
        return {"": path.stat().st_size}
    names = [file.relative_to(path).as_posix() for file in model_paths.files_of(path)]
    loaded = hub.loaded_files(names, lambda name: (path / name).read_text(encoding="utf-8"))
    return {name: (path / name).stat().st_size for name in sorted(loaded)}


def _copy(path: Path, copy: str) -> int:
    """Copy what is loaded of a model, but for files that are there; gives back the bytes."""
    filesystem, root = open_filesystem(copy)
    sent = 0
    for name, size in _files(path).items():
        place = f"{root}/{name}" if name else root
        if filesystem.get_file_info(place).size == size:
            continue
        with (
            whole_file(filesystem, place) as partial,
            (path / name if name else path).open("rb") as source,
            filesystem.open_output_stream(partial) as sink,
        ):
            while chunk := source.read(_BUFFER_BYTES):
                sink.write(chunk)
        sent += size
    return sent
