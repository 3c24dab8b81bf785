"""Models on the Hugging Face hub: what a reference means, the commit it stands for, and the files that are loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gem_ray.cache import cache_folder
from gem_ray.model_files import CONFIDENCE_FILE, GROUNDING_FILE, SCOPE_FILE

_REFERENCE = re.compile(
    r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^\s@:]+))?(?::(?P<file>[^\s:]+))?", re.ASCII
)
_COMMIT = re.compile("[0-9a-f]{40}")
# What loaders read beside the weights: transformers' files, and those of gem-ray's own model directories.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    GROUNDING_FILE,
    SCOPE_FILE,
    CONFIDENCE_FILE,
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)
# The first of a row that is there is what transformers, peft or `grounding.sam` loads.
_WEIGHTS = (
    (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "sam_vit_*.pth",
    ),
    ("adapter_model.safetensors", "adapter_model.bin"),
)
_INDEX = ".index.json"


@dataclass(frozen=True)
class HubReference:
    """`repo@revision:file`; without revision the default branch, without file the repository's model."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, reference: str) -> HubReference:
        """Take a reference apart.

        Raises:
            ValueError: it cannot be one.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise ValueError(f"{reference!r} is not `repo`, `repo@revision` or `repo@revision:file` of the hub")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class HubModel:
    """What a reference stands for.

    Attributes:
        reference: pinned to a commit.
        sizes: the files that are loaded, with their bytes.
    """

    reference: HubReference
    sizes: Mapping[str, int]


def look_up(reference: str) -> HubModel:
    """What a reference stands for now. Downloads no weights.

    A commit whose listing this machine has already seen costs no request; a branch or tag costs one.

    Raises:
        FileNotFoundError: there is no such model, or nothing in it that can be loaded; without a connection, it is not
            in the hub's cache on this machine.
        PermissionError: its owner wants terms accepted first.
    """
    from huggingface_hub import constants

    with _explained(reference):
        place = _pinned(HubReference.parse(reference), offline=constants.HF_HUB_OFFLINE)
        sizes = _tree(place)
        names = {place.file} if place.file else loaded_files(sizes, lambda name: _download(place, name).read_text())
        if missing := sorted(names - sizes.keys()):
            raise FileNotFoundError(f"it has no {', '.join(missing)}")
        return HubModel(place, {name: sizes[name] for name in sorted(names)})


def fetch(reference: str) -> Path:
    """The local path of a model, in the hub's cache; downloads the files that are loaded and no others.

    Raises:
        FileNotFoundError: as `look_up`, or the download failed.
        PermissionError: as `look_up`.
    """
    from huggingface_hub import snapshot_download

    model = look_up(reference)
    place = model.reference
    with _explained(reference):
        if (folder := _snapshot(place)) is None or not all((folder / name).is_file() for name in model.sizes):
            names = [*map(_literal, model.sizes)]
            folder = Path(
                snapshot_download(place.repo, revision=place.revision, allow_patterns=names, cache_dir=_cache())
            )
    return folder / place.file if place.file else folder


def read_file(reference: str, name: str) -> str:
    """The text of one file of a repository.

    Raises:
        FileNotFoundError, PermissionError: as `look_up`.
    """
    with _explained(reference):
        place = HubReference.parse(reference)
        return _download(place, name).read_text(encoding="utf-8")


def licence(model: HubModel) -> str | None:
    """What the hub says about a model's licence; `None` if nothing, or if it cannot be asked."""
    import httpx2
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(model.reference.repo, revision=model.reference.revision).card_data
    except (httpx2.HTTPError, OSError):
        return None
    return (card.get("license_name") or card.get("license")) if card else None


def is_pinned(reference: str) -> bool:
    """Whether a reference names a commit of the hub: it stands for the same files for ever."""
    match = _REFERENCE.fullmatch(reference)
    return match is not None and bool(_COMMIT.fullmatch(match["revision"] or ""))


def on_disk(reference: str) -> Path | None:
    """Where a model is in the hub's cache; `None` if not there, or not whole. Makes no request."""
    from huggingface_hub.errors import RevisionResolutionError

    try:
        place = _pinned(HubReference.parse(reference), offline=True)
    except (ValueError, RevisionResolutionError):
        return None
    folder = _snapshot(place)
    if folder is None:
        return None
    if place.file:
        return folder / place.file if (folder / place.file).is_file() else None
    try:
        names = loaded_files(_files(folder), lambda name: (folder / name).read_text())
    except FileNotFoundError:
        return None
    return folder if all((folder / name).is_file() for name in names) else None


def _pinned(place: HubReference, offline: bool) -> HubReference:
    """The commit that a revision stands for; offline, as the cache knows it."""
    from huggingface_hub import HfApi

    found = HfApi().resolve_revision(place.repo, revision=place.revision, cache_dir=_cache(), local_files_only=offline)
    return replace(place, revision=found.resolved)


def loaded_files(names: Collection[str], read: Callable[[str], str]) -> set[str]:
    """Of a repository's files, those that are loaded: settings, tokenizer, processor, and one format of the weights.

    Args:
        names: all files, as paths in the repository.
        read: gives the text of one of them; asked for the index of sharded weights.

    Raises:
        FileNotFoundError: there are no weights that a loader knows.
    """
    weights = {name for row in _WEIGHTS for name in _with_shards(_first(row, names), read)}
    if not weights:
        raise FileNotFoundError("it has no model.safetensors, pytorch_model.bin, adapter_model.* or sam_vit_*.pth")
    return {name for name in names if any(fnmatchcase(name, each) for each in _SETTINGS) and _is_flat(name)} | weights


def weight_files(folder: Path) -> list[Path]:
    """Of a local model's files, those whose weights are loaded, without an adapter's; empty: it has none."""
    files = _with_shards(_first(_WEIGHTS[0], _files(folder)), lambda name: (folder / name).read_text())
    return [folder / name for name in sorted(files) if not name.endswith(_INDEX)]


def _with_shards(names: Collection[str], read: Callable[[str], str]) -> set[str]:
    """Files of weights, and those that an index among them names."""
    shards = (json.loads(read(name))["weight_map"].values() for name in names if name.endswith(_INDEX))
    return {*names}.union(*shards)


def _first(patterns: tuple[str, ...], names: Collection[str]) -> list[str]:
    found = ([name for name in names if fnmatchcase(name, pattern) and _is_flat(name)] for pattern in patterns)
    return next(filter(None, found), [])


def _is_flat(name: str) -> bool:
    """Patterns match slashes too: of subfolders, only two hold what is loaded."""
    return "/" not in name or name.startswith(("adapter/", "additional_chat_templates/"))


def _tree(place: HubReference) -> dict[str, int]:
    """Every file of a commit with its bytes; without a connection, those on this machine."""
    from huggingface_hub import HfApi, constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    if constants.HF_HUB_OFFLINE:
        return _files_of_snapshot(place)
    try:
        files = get_cached_repo_tree(place.repo, revision=place.revision, cache_dir=_cache())
    except CachedRepoTreeNotFoundError:
        entries = HfApi().list_repo_tree(place.repo, revision=place.revision, recursive=True)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    return {file.path: file.size for file in files}


def _files_of_snapshot(place: HubReference) -> dict[str, int]:
    if (folder := _snapshot(place)) is None:
        raise FileNotFoundError("it is not on this machine, and HF_HUB_OFFLINE is set")
    return _files(folder)


def _files(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _snapshot(place: HubReference) -> Path | None:
    """The folder of a commit in the hub's cache, whole or not."""
    folder = _cache() / f"models--{place.repo.replace('/', '--')}" / "snapshots" / str(place.revision)
    return folder if folder.is_dir() else None


def _download(place: HubReference, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place.repo, name, revision=place.revision, cache_dir=_cache()))


def _cache() -> Path:
    """The hub's cache; where it is not and cannot be made, as for a user without a home, a folder in gem-ray's."""
    from huggingface_hub import constants

    usual = Path(constants.HF_HUB_CACHE).expanduser()
    there = next(folder for folder in (usual, *usual.parents) if folder.exists())
    return usual if usual.exists() or os.access(there, os.W_OK) else cache_folder() / "hub"


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


@contextmanager
def _explained(reference: str) -> Iterator[None]:
    """The hub's errors as one sentence."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        yield
    except GatedRepoError:
        repo = HubReference.parse(reference).repo
        raise PermissionError(
            f"{repo} is gated: accept its terms on the hub, then set HF_TOKEN to a token of that account"
        ) from None
    except RevisionResolutionError:
        raise FileNotFoundError(
            f"no model at {reference!r}: not a local path, not in the hub's cache here, and the hub cannot be asked"
            f"{' while HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else ''}"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no model at {reference!r}: not a local path, and the hub has no such repository; if it is private, set "
            "HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        revision = HubReference.parse(reference).revision
        raise FileNotFoundError(
            f"no model at {reference!r}: its repository on the hub has no branch, tag or commit {revision!r}"
        ) from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        why = "the hub did not give it"
        if constants.HF_HUB_OFFLINE:
            why = "not whole in the hub's cache here, while HF_HUB_OFFLINE is set"
        raise FileNotFoundError(f"no model at {reference!r}: not a local path, and {why}: {_reason(error)}") from None


def _reason(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
