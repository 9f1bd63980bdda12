"""Ops: the mathematics of each and its fast forms. Knows no flax, no config, no model."""
