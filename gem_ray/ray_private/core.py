"""Private names of Ray's core."""

SYSTEM_CONFIG = "_system_config"
"""Argument of `ray.init`, and of the head of a `ray.cluster_utils.Cluster`: settings of Ray's own processes."""
