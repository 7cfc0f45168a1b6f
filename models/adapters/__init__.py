"""Which tensors change the network, and how a draw of them changes a projection."""

from pyrolora.models.adapters.base import Adapter
from pyrolora.models.adapters.last_layer import LastLayer
from pyrolora.models.adapters.lora import LoRA
from pyrolora.models.adapters.polar import PoLAR

__all__ = ["Adapter", "LastLayer", "LoRA", "PoLAR"]
