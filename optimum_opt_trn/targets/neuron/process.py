"""What the Neuron runtime lets one process do: one number of ranks, and no forks."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..base import TargetError


class _Claim(NamedTuple):
    process: int
    tp_degree: int


# Of the first model whose weights were loaded here, or in the process that this one is a fork of.
_claim: _Claim | None = None


def claim_process(tp_degree: int) -> None:
    """To be called before weights are loaded for a model of `tp_degree` ranks.

    The runtime's number of ranks is set when the first weights are loaded, for the life of the process. The runtime
    does not survive a fork: loading would wait for ever in the child.

    Raises:
        TargetError: if this process cannot load such a model.
    """
    global _claim
    check_fork()
    if _claim is not None and _claim.tp_degree != tp_degree:
        raise TargetError(
            f"This process has loaded a model with tp_degree={_claim.tp_degree}, and the Neuron runtime keeps that "
            f"number of ranks until the process ends: load this one, with tp_degree={tp_degree}, in another process."
        )
    _claim = _Claim(os.getpid(), tp_degree)


def check_fork() -> None:
    """Raises TargetError in a fork of a process that has loaded a model."""
    if _claim is not None and _claim.process != os.getpid():
        raise TargetError(
            "This process is a fork of one that has loaded a model onto NeuronCores, and the Neuron runtime does not "
            'work in a fork. Start the process anew: multiprocessing.get_context("spawn").'
        )
