"""The compiled kernels (`csrc/module.cpp`), or None if they were not built with the package."""

from __future__ import annotations


try:
    from . import _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

__all__ = ["_kernels"]
