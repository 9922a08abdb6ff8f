"""Continuous batching: any number of requests on the slots that an export has. docs/serving.md is its page."""

from .manager import ContinuousBatchingManager
from .mixin import ContinuousBatchingMixin
from .results import BatchResults
from .statistics import Statistics


__all__ = ["BatchResults", "ContinuousBatchingManager", "ContinuousBatchingMixin", "Statistics"]
