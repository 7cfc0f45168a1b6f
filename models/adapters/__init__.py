"""Which tensors change the network, and how a draw of them changes a projection."""

from pyrolora.models.adapters.base import Adapter
from pyrolora.models.adapters.corda import CorDA
from pyrolora.models.adapters.full_rank import FullRank
from pyrolora.models.adapters.item_projector import ItemProjector
from pyrolora.models.adapters.label_lora import LabelLoRA
from pyrolora.models.adapters.last_layer import LastLayer
from pyrolora.models.adapters.lora import LoRA
from pyrolora.models.adapters.mixture import MixtureLoRA
from pyrolora.models.adapters.moefied import MoEfiedLoRA
from pyrolora.models.adapters.pissa import PiSSA
from pyrolora.models.adapters.polar import PoLAR
from pyrolora.models.adapters.pool import LoRAPool
from pyrolora.models.adapters.quantised import QPiSSA
from pyrolora.models.adapters.s2ft import S2FT

__all__ = [
    "S2FT",
    "Adapter",
    "CorDA",
    "FullRank",
    "ItemProjector",
    "LabelLoRA",
    "LastLayer",
    "LoRA",
    "LoRAPool",
    "MixtureLoRA",
    "MoEfiedLoRA",
    "PiSSA",
    "PoLAR",
    "QPiSSA",
]
