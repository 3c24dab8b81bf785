"""gem-ray: granular entity mapping of social posts, on Ray."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Client":  # imported when it is used: it needs Arrow and httpx
        from gem_ray.client import Client

        return Client
    raise AttributeError(f"module 'gem_ray' has no attribute {name!r}")
