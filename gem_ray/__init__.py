"""gem-ray: granular entity mapping of social posts, on Ray.

The public Python API, stable within a minor version; modules may move under it:

- `load_config` reads a preset, a YAML file and overrides into a `Config`; `ConfigError` says which key is wrong.
- `Annotator` runs the stages of a configuration in this process: `read_posts` in, the same `Post` objects out.
- `annotate_dataset` runs them on Ray over a folder or an `s3://` prefix; a second call resumes. It returns a
  `RunSummary`, and raises `RunError` when the run fails underway.
- `Post`, `Entity`, `Candidate`, `Box`, `Point`, `HeatMap`, `GoldEntity`, `Problem`, `ProblemKind` and `Status` are the
  records. `INPUT_SCHEMA` and `ANNOTATION_SCHEMA` are the Arrow schemas of the input and the output; `SCHEMA_VERSION` is
  the output's edition.
- `Client` and `AsyncClient` call the online service, return `Annotation` and raise `ClientError`. An annotation is made
  of the records in `gem_ray.client`, which needs httpx alone.

Names are imported on first use: `import gem_ray` loads neither torch nor Ray, and `gem_ray.Client` does not either.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "ANNOTATION_SCHEMA": "records",
    "Annotation": "client",
    "Annotator": "annotator",
    "AsyncClient": "client",
    "Box": "records",
    "Candidate": "records",
    "Client": "client",
    "ClientError": "client",
    "Config": "config",
    "ConfigError": "config",
    "Entity": "records",
    "GoldEntity": "records",
    "HeatMap": "records",
    "INPUT_SCHEMA": "records",
    "Point": "records",
    "Post": "records",
    "Problem": "records",
    "ProblemKind": "records",
    "RunError": "pipeline.execution",
    "RunSummary": "pipeline.summary",
    "SCHEMA_VERSION": "records",
    "Status": "records",
    "annotate_dataset": "pipeline.run",
    "load_config": "config",
    "read_posts": "data.shards",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # what type checkers and editors see in place of `__getattr__`
    from gem_ray.annotator import Annotator as Annotator
    from gem_ray.client import Annotation as Annotation
    from gem_ray.client import AsyncClient as AsyncClient
    from gem_ray.client import Client as Client
    from gem_ray.client import ClientError as ClientError
    from gem_ray.config import Config as Config
    from gem_ray.config import ConfigError as ConfigError
    from gem_ray.config import load_config as load_config
    from gem_ray.data.shards import read_posts as read_posts
    from gem_ray.pipeline.execution import RunError as RunError
    from gem_ray.pipeline.run import annotate_dataset as annotate_dataset
    from gem_ray.pipeline.summary import RunSummary as RunSummary
    from gem_ray.records import ANNOTATION_SCHEMA as ANNOTATION_SCHEMA
    from gem_ray.records import INPUT_SCHEMA as INPUT_SCHEMA
    from gem_ray.records import SCHEMA_VERSION as SCHEMA_VERSION
    from gem_ray.records import Box as Box
    from gem_ray.records import Candidate as Candidate
    from gem_ray.records import Entity as Entity
    from gem_ray.records import GoldEntity as GoldEntity
    from gem_ray.records import HeatMap as HeatMap
    from gem_ray.records import Point as Point
    from gem_ray.records import Post as Post
    from gem_ray.records import Problem as Problem
    from gem_ray.records import ProblemKind as ProblemKind
    from gem_ray.records import Status as Status
else:

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(f"gem_ray.{_HOMES[name]}"), name)
        raise AttributeError(f"module 'gem_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
