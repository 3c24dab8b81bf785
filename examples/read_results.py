"""Query an output with DuckDB and with Polars: the same table twice.

python examples/read_results.py out/
"""

import sys

import duckdb
import polars as pl

files = f"{sys.argv[1]}/annotations/**/part-*.parquet"

print(
    duckdb.sql(f"""
        select entity['fine'] as fine, count(*) as mentions, sum((entity['seen'] is true)::int) as seen
        from (select unnest(entities) as entity from read_parquet('{files}', hive_partitioning = true))
        group by all order by mentions desc, fine
    """)
)

entity = pl.col("entities").struct
print(
    pl.scan_parquet(files, hive_partitioning=True)
    .explode("entities")
    .drop_nulls("entities")
    .group_by(entity.field("fine"))
    .agg(mentions=pl.len(), seen=entity.field("seen").sum())
    .sort("mentions", "fine", descending=[True, False])
    .collect()
)
