"""The output folder as people read it: pyarrow, DuckDB, Polars, pandas, Ray Data and Hugging Face `datasets`."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from gem_ray.evaluation.predictions import iterate_rows
from gem_ray.records import SCHEMA_VERSION, SCHEMA_VERSION_KEY

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def annotations(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published rows of a run, among files of the kinds that engines leave in a folder and readers must pass by."""
    folder = tmp_path_factory.mktemp("readers") / "annotations"
    shutil.copytree(run[0] / "annotations", folder)
    some = next(folder.rglob("*.parquet"))
    for name in ("_SUCCESS", "_complete.json", ".part-0.parquet.crc", "_part-0.parquet.partial"):
        for place in (folder, some.parent):
            (place / name).write_bytes(b"not Parquet")
    return folder


@pytest.fixture(scope="module")
def expected(annotations: Path) -> Rows:
    """Every file read by itself, with the status that its folder says."""
    files = [file for file in annotations.rglob("*.parquet") if file.name[0] not in "._"]
    statuses = {file: file.parent.name.removeprefix("status=") for file in files}
    rows = [row | {"status": statuses[file]} for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    assert len({row["status"] for row in rows}) == 3
    assert {row["entities"][0]["seen"] for row in rows if row["entities"]} == {True, False, None}
    return sorted(rows, key=lambda row: row["row_id"])


def pyarrow_rows(folder: Path) -> Rows:
    return ds.dataset(folder, partitioning="hive").to_table().to_pylist()


def duckdb_rows(folder: Path) -> Rows:
    import duckdb

    query = f"from read_parquet('{folder}/**/[!._]*.parquet', hive_partitioning = true)"
    return pa.table(duckdb.sql(query).to_arrow_table()).to_pylist()


def polars_rows(folder: Path) -> Rows:
    import polars

    return polars.read_parquet(f"{folder}/**/[!._]*.parquet", hive_partitioning=True).to_dicts()


def pandas_rows(folder: Path) -> Rows:
    import pandas

    return pa.Table.from_pandas(pandas.read_parquet(folder)).to_pylist()


def ray_rows(folder: Path) -> Rows:
    import ray

    return ray.data.read_parquet(str(folder), file_extensions=["parquet"]).take_all()


def datasets_rows(folder: Path) -> Rows:
    import datasets

    files = f"{folder}/status=*/part-*.parquet"
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder.parent / "cache"))
    return read.to_list()


@pytest.mark.parametrize(
    "read",
    [pyarrow_rows, duckdb_rows, polars_rows, pandas_rows, ray_rows, datasets_rows],
    ids=["pyarrow", "duckdb", "polars", "pandas", "ray", "datasets"],
)
def test_readers_find_every_row_as_it_was_written(
    read: Callable[[Path], Rows],
    annotations: Path,
    expected: Rows,
    assert_same: Callable[[Any, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = sorted((plain(row) for row in read(annotations)), key=lambda row: row["row_id"])
    if "status" not in rows[0]:  # `datasets` reads no partitions from paths
        rows = [row | {"status": before["status"]} for row, before in zip(rows, expected, strict=True)]
    assert_same(rows, [plain(row) for row in expected])


def plain(value: Any) -> Any:
    """Python's own values: readers give arrays for lists and bytes, and enums for strings."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_partitions_are_laid_out_as_spark_discovers_them(annotations: Path) -> None:
    """`column=value` folders of one depth, files whose schemas agree and lack the column, and nothing else visible."""
    for folder, _, names in os.walk(annotations):
        visible = [name for name in names if name[0] not in "._"]
        assert all(name.endswith(".parquet") for name in visible)
        is_leaf = Path(folder) != annotations
        assert not visible or (is_leaf and Path(folder).parent == annotations and "status=" in folder)
    schemas = [pq.read_schema(file) for file in annotations.glob("status=*/part-*.parquet")]
    assert all(schema.equals(schemas[0]) and "status" not in schema.names for schema in schemas)
    assert not any(pa.types.is_map(field.type) for field in schemas[0])


def test_every_published_file_says_its_edition(annotations: Path, expected: Rows) -> None:
    files = list(annotations.glob("status=*/part-*.parquet"))
    assert {pq.read_metadata(file).metadata[SCHEMA_VERSION_KEY] for file in files} == {str(SCHEMA_VERSION).encode()}
    assert Counter(row["row_id"] for row in iterate_rows(annotations)) == Counter(row["row_id"] for row in expected)
