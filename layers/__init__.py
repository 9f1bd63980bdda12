"""Flax NNX modules: what a network is put together from. Names logical axes; knows no mesh."""
