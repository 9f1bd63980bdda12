"""One attention made into another: what a trained network can be converted to, with what each stage cost."""

from models.conversion import expanded, moh, tpla, transmla, xecomla
from models.conversion.contract import Conversion, Kind
from models.conversion.expanded import convert_to_mha_latent
from models.conversion.latent import ConversionError
from models.conversion.moh import convert_to_moh
from models.conversion.normed import with_latent_norms
from models.conversion.report import Report, Stage
from models.conversion.tpla import convert_to_tpla
from models.conversion.transmla import convert_to_transmla
from models.conversion.xecomla import upcycle

#: What `eval.py convert --to=NAME` offers.
KINDS = {
    "tpla": Kind(convert_to_tpla, tpla.flags, "MLA"),
    "transmla": Kind(convert_to_transmla, transmla.flags, "GQA, MQA or MHA"),
    "mha_latent": Kind(convert_to_mha_latent, expanded.flags, "GQA, MQA or MHA", calibrates=False),
    "moh": Kind(convert_to_moh, moh.flags, "MHA, GQA or MQA", calibrates=False),
    "x-ecomla": Kind(upcycle, xecomla.flags, "MHA, GQA or MQA", calibrates=False),
}

__all__ = [
    "KINDS",
    "Conversion",
    "ConversionError",
    "Kind",
    "Report",
    "Stage",
    "convert_to_mha_latent",
    "convert_to_moh",
    "convert_to_tpla",
    "convert_to_transmla",
    "upcycle",
    "with_latent_norms",
]
