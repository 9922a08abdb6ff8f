"""The split checkpoint: its layout, and how it is written, verified, published and read by ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .hub import push_to_hub
    from .layout import CheckpointError
    from .read import ModelWeights, load_weights
    from .verify import verify_checkpoint
    from .write import save_pretrained_split

# Public name -> the module that has it, which is imported at first use.
_EXPORTS = {
    "CheckpointError": "layout",
    "ModelWeights": "read",
    "load_weights": "read",
    "push_to_hub": "hub",
    "save_pretrained_split": "write",
    "verify_checkpoint": "verify",
}

__all__ = [
    "CheckpointError",
    "ModelWeights",
    "load_weights",
    "push_to_hub",
    "save_pretrained_split",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
