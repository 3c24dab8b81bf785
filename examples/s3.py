"""Annotate from a bucket into a bucket. Credentials are looked for where boto3 looks.

python examples/s3.py s3://bucket/posts/ s3://bucket/out/
"""

import sys

import pyarrow.dataset as ds
from pyarrow import fs

from gem_ray import annotate_dataset, load_config

posts, out = sys.argv[1:]
config = load_config("nano")
summary = annotate_dataset(posts, out, config)
print(f"{summary.rows} posts, {summary.tally.entities} entities, {summary.rejected} rejected")

again = annotate_dataset(posts, out, config)  # resumes; a finished run has nothing left to do
print(f"{again.annotated} posts the second time")

filesystem, root = fs.FileSystem.from_uri(out)
rows = ds.dataset(f"{root}/annotations", filesystem=filesystem, partitioning="hive")
print(f"{rows.count_rows()} rows, {rows.count_rows(filter=ds.field('status') == 'ok')} of them ok")
