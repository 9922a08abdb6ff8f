"""The split checkpoint: what is in it, how it is written, and how ranks read it."""

from .load import ModelWeights, load_weights
from .source import CheckpointError
from .split import save_pretrained_split


__all__ = ["CheckpointError", "ModelWeights", "load_weights", "save_pretrained_split"]
