"""What a model's directory says of the model in a small JSON file beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

GROUNDING_FILE, SCOPE_FILE, CONFIDENCE_FILE = "grounding.json", "scope.json", "confidence.json"

F = TypeVar("F", bound="ModelFile")


class ModelFile(BaseModel):
    """A file of a model's directory.

    Attributes:
        file_name: of the file.
        fault: what a wrong file is told, after its path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_name: ClassVar[str]
    fault: ClassVar[str]

    @classmethod
    def load(cls: type[F], path: Path) -> F | None:
        """A model directory's; None where it says nothing, or where the model is a single file.

        Raises:
            ValueError: the file holds something else; the message names it.
        """
        file = path / cls.file_name
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{file} {cls.fault}: {faults_of(error)}") from None

    def save(self, folder: Path) -> None:
        """Write it into a model directory."""
        text = self.model_dump_json(indent=2, exclude_none=True, ensure_ascii=False)
        (folder / self.file_name).write_text(text + "\n", encoding="utf-8")


def faults_of(error: ValidationError) -> str:
    """What is wrong with a file, each key with its fault, in one line."""
    return "; ".join(": ".join((*map(str, fault["loc"]), fault["msg"])) for fault in error.errors())
