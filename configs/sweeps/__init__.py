"""Sweeps: files that say which runs belong together, and the combinators they are written with.

A sweep file defines

    CONFIG = "configs/lm.py:size=tiny"       the config every point starts from (as after --config=)
    SWEEP = product(...)                     a list of points, each a dict of dotted overrides

A point's field `name` names its run, else the fields that differ do. `python train.py --sweep=FILE` runs the points.
"""

from configs.sweeps.combinators import Point, Sweep, chain, label, labels, overlay, param, product, zip_

__all__ = ["Point", "Sweep", "chain", "label", "labels", "overlay", "param", "product", "zip_"]
