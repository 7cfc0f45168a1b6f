"""Vision transformers as backbones: images in, the features of their class token out."""

from pyrolora.models.vision.backbone import VisionBackbone
from pyrolora.models.vision.loading import is_vision, load_vision

__all__ = ["VisionBackbone", "is_vision", "load_vision"]
