"""The split checkpoint: what is in it, how it is written, verified and published, and how ranks read it."""

from .hub import push_to_hub
from .load import ModelWeights, load_weights
from .source import CheckpointError
from .split import save_pretrained_split
from .verify import verify_checkpoint


__all__ = [
    "CheckpointError",
    "ModelWeights",
    "load_weights",
    "push_to_hub",
    "save_pretrained_split",
    "verify_checkpoint",
]
