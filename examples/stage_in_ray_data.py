"""Use the tagger inside a Ray Data pipeline of your own: one row an entity, people only, as Parquet.

python examples/stage_in_ray_data.py posts/ people/
"""

import sys

import pyarrow as pa
import ray

from gem_ray import Annotator, load_config
from gem_ray.annotator import build_stage
from gem_ray.data.prepare import post_from_row
from gem_ray.stages import tagging_stages


class FindEntities:
    """The stages up to the tagger, loaded once in each actor."""

    def __init__(self) -> None:
        config = load_config("nano")
        self.annotator = Annotator([build_stage(spec, config) for spec in tagging_stages(config)])

    def __call__(self, rows: pa.Table) -> pa.Table:
        posts = self.annotator.annotate([post_from_row(row) for row in rows.to_pylist()])
        found = [(post.post_id, entity) for post in posts for entity in post.entities]
        return pa.table(
            {
                "post_id": pa.array([post_id for post_id, _ in found], pa.string()),
                "name": pa.array([entity.text for _, entity in found], pa.string()),
                "coarse": pa.array([entity.coarse for _, entity in found], pa.string()),
            }
        )


posts = ray.data.read_parquet(sys.argv[1], file_extensions=["parquet"]).select_columns(["post_id", "text", "tokens"])
entities = posts.map_batches(
    FindEntities, batch_format="pyarrow", batch_size=32, compute=ray.data.ActorPoolStrategy(size=1)
)
entities.filter(expr="coarse == 'person'").write_parquet(sys.argv[2])
