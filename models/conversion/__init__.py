"""One attention made into another: what a trained network can be converted to, with what each stage cost."""

from models.conversion.report import Report, Stage
from models.conversion.tpla import Conversion, convert_to_tpla

__all__ = ["Conversion", "Report", "Stage", "convert_to_tpla"]
