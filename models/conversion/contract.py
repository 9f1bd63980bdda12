"""What every conversion of an attention is: a function of a network that gives a network, and what it costs."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from models.conversion.report import Report
from models.decoder import DecoderLM


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted network, its `config.model`, and what its stages cost."""

    model: DecoderLM
    config: dict[str, Any]
    report: Report


#: (model, config.model, *, calibration_ids=, report_ids=, progress=, its own options): `calibration_ids` [N, T] is text
#: to measure the network on, `report_ids` [M, T] other text, on which every stage is measured; either may be None.
#: `progress` is called with (what, done, total). A `ConversionError` says in one line what cannot be done.
Convert = Callable[..., Conversion]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A conversion by name, as `eval.py convert --to=NAME` offers it.

    Attributes:
        convert: does it; called with (model, config.model, calibration_ids=, report_ids=, progress=, **flags).
        flags: adds the conversion's own flags to a parser; their names are the keywords of `convert`.
        source: what a run must have to be converted so, for the help.
        calibrates: whether it wants `calibration_ids`; where not, none are read, and the keyword is not given.
    """

    convert: Convert
    flags: Callable[[argparse.ArgumentParser], None]
    source: str
    calibrates: bool = True
