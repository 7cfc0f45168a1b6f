"""Sequential recommendation: interactions, windows with candidates, a sequence encoder, and prompts that hold items."""

from pyrolora.models.recommendation.interactions import Interactions, read_interactions
from pyrolora.models.recommendation.preparation import Preparation
from pyrolora.models.recommendation.sasrec import SASRec, fit_sasrec
from pyrolora.models.recommendation.windows import Window, windows_of

__all__ = ["Interactions", "Preparation", "SASRec", "Window", "fit_sasrec", "read_interactions", "windows_of"]
