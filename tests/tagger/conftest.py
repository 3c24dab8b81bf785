"""A random tiny BERT with a WordPiece vocabulary, built here, and a few posts in its words."""

from pathlib import Path

import pytest
import replicas

from gem_ray.records import GoldEntity, Post
from gem_ray.tagger.features import SubwordEncoder, load_tokenizer

TEXT = "the in at sees plays new taylor swift london paris google visits and singer city of from said"
PIECES = ["##s", "##ing", "##er", "tweet", "ny", "##ork", "y", ".", "@", "#", ":"]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    replicas.encoder(folder, [*TEXT.split(), *PIECES], max_position_embeddings=64)
    return folder


@pytest.fixture
def features(encoder_folder: Path) -> SubwordEncoder:
    return SubwordEncoder(load_tokenizer(encoder_folder), max_length=64)


def _post(number: int, text: str, *gold: tuple[int, int, str], knowledge: str | None = None) -> Post:
    entities = [GoldEntity(*span) for span in gold]
    return Post(f"p{number}", text, tokens=text.split(), knowledge=knowledge, gold=entities)


@pytest.fixture
def posts() -> list[Post]:
    return [
        _post(0, "taylor swift plays in london", (0, 2, "musician"), (4, 5, "city"), knowledge="taylor swift singer"),
        _post(1, "google visits paris", (0, 1, "company"), (2, 3, "city")),
        _post(2, "the singer from new york said tweets :", (3, 5, "city")),
        _post(3, "paris sees google", (0, 1, "city"), (2, 3, "company"), knowledge="paris city of the new singer"),
        _post(4, "the singer said", knowledge="the singer"),
        _post(5, "in london taylor swift", (1, 2, "city"), (2, 4, "musician")),
        _post(6, "swift", (0, 1, "musician")),
        _post(7, "@ google # london", (1, 2, "company"), (3, 4, "city")),
    ]
