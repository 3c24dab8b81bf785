"""gem-ray: granular entity mapping of social posts, on Ray."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("Client", "AsyncClient"):  # imported when they are used: they need httpx
        from gem_ray import client

        return getattr(client, name)
    raise AttributeError(f"module 'gem_ray' has no attribute {name!r}")
