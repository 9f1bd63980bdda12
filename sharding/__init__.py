"""Meshes and layouts: which device holds which part of what.

`build(config.sharding)` gives the `Layout` of a run; layers use `sharding.logical`; `collectives` counts what a
compiled program sends between devices.
"""

from sharding.collectives import Collective, collectives
from sharding.layout import Layout, build
from sharding.logical import ShardingError

__all__ = ["Collective", "Layout", "ShardingError", "build", "collectives"]
