"""What a model knows, as its directory may say in `scope.json`: outside it, a stage leaves an entity as it is."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cached_property

from pydantic import Field, field_validator

from gem_ray.config import Config, nearest
from gem_ray.model_files import SCOPE_FILE, ModelFile
from gem_ray.model_paths import resolve
from gem_ray.model_references import model_keys, reference_at
from gem_ray.records import Entity, Post
from gem_ray.stages import find_stage
from gem_ray.taxonomy import LABEL_SETS

_OTHER_ADAPTERS = "reranker_adapter_"  # loaded beside the one in use


class Scope(ModelFile):
    """The entities and images that a model was made for. What is not said is not bounded."""

    file_name = SCOPE_FILE
    fault = "does not say what a model knows"

    knows: str = Field(min_length=1, description="what it knows, for people: ends the sentence `it knows only …`")
    names: tuple[str, ...] | None = Field(None, description="of the entities, compared by letters and digits alone")
    categories: tuple[str, ...] | None = Field(None, description="fine categories of the entities")
    image_sizes: tuple[tuple[int, int], ...] | None = Field(
        None, description="width and height in pixels of the upright originals"
    )

    @field_validator("categories")
    @classmethod
    def _are_known(cls, categories: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = sorted({fine for labels in LABEL_SETS.values() for fine in labels.fine})
        for category in categories or ():
            if category not in known:
                raise ValueError(f"there is no category {category!r}; {nearest(category, known)}")
        return categories

    def covers(self, post: Post, entity: Entity) -> bool:
        """Whether the model knows such an entity in such an image."""
        return (
            (self.names is None or _letters(entity.text) in self._names)
            and (self.categories is None or entity.fine in self.categories)
            and (self.image_sizes is None or _size(post) in self.image_sizes)
        )

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(map(_letters, self.names or ()))


def load_scopes(stage: str, config: Config) -> tuple[Scope, ...]:
    """What the models of a stage say of themselves; of adapters, the one in use.

    Raises:
        FileNotFoundError: a model is not there.
        ValueError: a `scope.json` is none.
    """
    keys = model_keys([find_stage(stage)], config)
    references = [reference_at(config, key) for role, key in keys.items() if not role.startswith(_OTHER_ADAPTERS)]
    loaded = (Scope.load(resolve(reference)) for reference in references if reference)
    return tuple(scope for scope in loaded if scope is not None)


def is_known(scopes: Sequence[Scope], post: Post, entity: Entity) -> bool:
    """Whether an entity is within all scopes: a stage judges with all its models, or not at all."""
    return all(scope.covers(post, entity) for scope in scopes)


def _letters(name: str) -> str:
    """`#PortAlmery` and `Port Almery` are one name."""
    return "".join(character for character in unicodedata.normalize("NFKC", name).casefold() if character.isalnum())


def _size(post: Post) -> tuple[int | None, int | None]:
    """Width and height of the original; of the decoded image where a caller set only that."""
    height, width = post.image.shape[:2] if post.image is not None else (None, None)
    return post.image_width or width, post.image_height or height
