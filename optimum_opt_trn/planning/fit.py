"""Refuses an export that cannot fit, before it is compiled or loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.utils import logging

from ..hardware import in_units
from ..model.shapes import ModelShape
from .host import largest_of_family
from .memory import MemoryPlan, plan_memory, settings_that_fit
from .setup import Setup


if TYPE_CHECKING:
    from ..configuration_opt import OPTNeuronConfig


logger = logging.get_logger(__name__)


class DoesNotFitError(ValueError):
    """An export that needs more memory than there is."""


def check_fit(config: ModelShape, neuron_config: OPTNeuronConfig, force: bool = False) -> None:
    """Checks an export against the cores of its instance family, or on `cpu` against the memory available now.

    On `cpu` everything except the weights has to fit. Weights are mapped files: if memory is short, there is a warning
    that they are read from the disk again and again. With `force` there are only warnings.

    Raises:
        DoesNotFitError: with the sums, and with settings that fit.
    """
    try:
        instance = largest_of_family(neuron_config.instance_type)
    except OSError:  # the system does not tell how much memory there is
        return
    setup = Setup.of(neuron_config)
    plan = plan_memory(config, setup, instance)
    if plan.fits:
        return
    if plan.runs:
        logger.warning(f"{_shortage(plan)}. Weights will be read from the disk again and again, which is slow.")
        return
    if force:
        logger.warning(f"{_shortage(plan)}. Continuing, since force is given.")
        return
    ways = [*settings_that_fit(config, setup, instance), "force=True (--force) to continue in spite of this"]
    raise DoesNotFitError(f"{_shortage(plan)}. Choose {', or '.join(ways)}.")


def _shortage(plan: MemoryPlan) -> str:
    setup, instance = plan.setup, plan.instance
    parts = {
        "weights": sum(plan.weights.values()),
        "cache": plan.cache,
        "workspace": plan.workspace,
        "reserve": plan.reserve,
    }
    listed = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items() if size)
    where = f"a core of {instance.family.name} has" if instance.on_neuron else "are available on this host"
    return (
        f"batch_size={setup.batch_size}, sequence_length={setup.sequence_length}, tp_degree={setup.tp_degree} needs "
        f"{in_units(plan.total)} ({listed}), {in_units(-plan.free)} more than the {in_units(instance.core_bytes)} "
        f"that {where}"
    )
