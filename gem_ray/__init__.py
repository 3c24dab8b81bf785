"""gem-ray: granular entity mapping of social posts, on Ray."""

__version__ = "0.1.0"
