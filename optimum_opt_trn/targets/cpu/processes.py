"""Several processes that share one model, on one host or on several: each holds some of the ranks.

Every process runs the same program. They exchange the sums of row-parallel products, the parts of logits and, at the
beginning of a call, what must be the same in all of them: the random generator's state, the inputs, when to stop. All
of it goes through torch.distributed with gloo.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import TargetError


Result = TypeVar("Result")

# An export of a large checkpoint takes long, while other processes wait. A process that ends is noticed at once.
TIMEOUT = timedelta(days=2)


class OutOfStepError(RuntimeError):
    """The processes do not make the same calls, or one of them has ended; the message says which."""


class Processes:
    """The processes that share one model.

    Args:
        rank: of this process.
        hosts: for each process, a text that is the same for processes of one host.
        group: connects them.
    """

    def __init__(self, rank: int, hosts: list[str], group: dist.ProcessGroup):
        self.rank = rank
        self.count = len(hosts)
        self.hosts = hosts
        self._group = group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, added in the order of their ranks: the same bits in all of them."""
        parts = self._gather_tensors(tensor)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated in the last dimension."""
        return torch.cat(self._gather_tensors(tensor), dim=-1)

    def share_generator(self) -> None:
        """Gives torch's default generator the state that it has in the first process."""
        torch.set_rng_state(self._gather("generator", torch.get_rng_state())[0])

    def decide(self, decision: Tensor) -> Tensor:
        """The first process's bool tensor."""
        first: Tensor = self._gather("decision", decision)[0]
        return first

    def check_same(self, what: str, *inputs: Tensor | str) -> None:
        """Raises OutOfStepError, in every process, unless all of them have the same `inputs`."""
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        for value in inputs:
            content = value.encode() if isinstance(value, str) else value.contiguous().numpy().tobytes()
            shape = "" if isinstance(value, str) else str(tuple(value.shape))
            digest.update(shape.encode() + content)
        digests = self._gather("inputs", digest.hexdigest())
        different = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise OutOfStepError(
                f"{what}: process {different[0]} has other inputs than process 0. Every process must make the same "
                "calls with the same arguments: the same export, prompts and options. (For other prompts in each "
                "process, load without tp_processes: then each has a model of its own.)"
            )

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which all processes do; if it fails in one, all of them raise.

        Raises:
            OutOfStepError: if it failed in another process; in that one, the error itself.
        """
        result: Any = None
        error = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        messages = self._gather("end", None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise OutOfStepError(f"Process {rank} failed, and the others with it. It says: {message}")
        done: Result = result
        return done

    def once(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which one process of each host does while the others wait; errors as `together`."""
        first = self.hosts.index(self.hosts[self.rank])
        mine = self.together(lambda: work() if first == self.rank else None)
        done: Result = self._gather("result", mine)[first]
        return done

    def _gather(self, kind: str, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        gathered: list[Any] = [None] * self.count
        self._exchange(lambda: dist.all_gather_object(gathered, (kind, value), group=self._group))
        for rank, (other, _) in enumerate(gathered):
            if other != gathered[0][0]:
                raise OutOfStepError(
                    f"Process {rank} is not where process 0 is: every process must make the same calls with the same "
                    "arguments. Start them again."
                )
        return [value for _, value in gathered]

    def _gather_tensors(self, mine: Tensor) -> list[Tensor]:
        """Every process's tensor; shapes are the same, since inputs were compared before."""
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.count)]
        self._exchange(lambda: dist.all_gather(parts, mine.contiguous(), group=self._group))
        return parts

    def _exchange(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            raise OutOfStepError(
                f"Another process has ended or failed, and its own message says why ({error}). Start the processes "
                "again."
            ) from error


def local_degree(tp_degree: int, tp_processes: int) -> int:
    """How many ranks each of the processes holds.

    Raises:
        TargetError: if another number of processes was started, or if they cannot hold equally many ranks.
    """
    if dist.is_available() and dist.is_initialized():
        started = dist.get_world_size()
    else:
        started = int(os.environ.get("WORLD_SIZE", "1"))
    if tp_processes not in (1, started):
        raise TargetError(
            f"tp_processes={tp_processes}, and {started} process(es) were started: start as many as share the model, "
            f"for example with `torchrun --nproc_per_node {tp_processes}`, or leave tp_processes out for a model in "
            "each process."
        )
    if tp_degree % tp_processes:
        suggested = -(-tp_degree // tp_processes) * tp_processes
        raise TargetError(
            f"tp_processes={tp_processes} cannot hold equal shares of an export with tp_degree={tp_degree}: export "
            f"with tp_degree={suggested}, or start a number of processes that divides {tp_degree}."
        )
    return tp_degree // tp_processes


@functools.cache
def all_processes() -> Processes:
    """The processes that were started together, connected. All of them must call it.

    torch.distributed is initialised from the environment, with gloo, if nobody has done so.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, count = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    package = logging.getLogger("optimum_opt_trn")
    if rank and package.level == logging.NOTSET:
        package.setLevel(logging.ERROR)  # one process's warnings are enough
    # With torchrun's number of the host, since containers may have one name.
    host = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"
    hosts: list[Any] = [None] * count
    dist.all_gather_object(hosts, host, group=group)
    return Processes(rank, hosts, group)
