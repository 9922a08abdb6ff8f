"""Ranks spread over processes and hosts: every process runs the same program on its own, and they meet in each sum.

Nothing leads and nothing is sent around but sums, logits and, where a call begins, what must be the same in all: the
random generator's state, what is fed, when to stop.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import TargetError
from . import sockets
from .sockets import OutOfStepError


Result = TypeVar("Result")

# What messages are for.
SUM, JOIN, SIZES, OBJECTS, GENERATOR, DECISION, INPUTS = range(7)

# An export of a large checkpoint takes that long, and other processes wait. One that ends is noticed at once.
TIMEOUT = timedelta(days=2)


class Transport(Protocol):
    """What carries messages."""

    def exchange(self, kind: int, mine: Tensor) -> list[Tensor]:
        """Every process's tensor, in the order of their ranks; kind and size are the same in all."""


class Processes:
    """The processes that hold one model together.

    Args:
        rank: of this process.
        hosts: of each process, what tells its host from others.
        transport: between them.
    """

    def __init__(self, rank: int, hosts: list[str], transport: Transport):
        self.rank = rank
        self.count = len(hosts)
        self.hosts = hosts
        self._exchange = transport.exchange

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in the order of their ranks: the same bits in all of them."""
        parts = self._exchange(SUM, tensor.contiguous())
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated in the last dimension."""
        return torch.cat(self._exchange(JOIN, tensor.contiguous()), dim=-1)

    def share_generator(self) -> None:
        """Gives torch's default generator the state that it has in the first process."""
        torch.set_rng_state(self._exchange(GENERATOR, torch.get_rng_state())[0])

    def decide(self, decision: Tensor) -> Tensor:
        """What the first process decided; bool tensors of one shape."""
        return self._exchange(DECISION, decision.contiguous())[0]

    def check_same(self, what: str, *inputs: Tensor | str) -> None:
        """Raises OutOfStepError, in every process, unless all of them have the same `inputs`."""
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        for value in inputs:
            digest.update(value.encode() if isinstance(value, str) else value.contiguous().numpy().tobytes())
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        parts = self._exchange(INPUTS, mine)
        different = [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]
        if different:
            raise OutOfStepError(
                f"{what}: process {different[0]} has other inputs than process 0. Every process must make the same "
                "calls with the same arguments: the same export, prompts and options. (For other prompts in each "
                "process, load a whole model in each: export with tp_degree=1 and unset WORLD_SIZE.)"
            )

    def together(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which all processes do; if it fails in one, all of them raise.

        Raises:
            OutOfStepError: if it failed in another process; in that one, what it raised.
        """
        result: Any = None
        error = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        messages = self._gather(None if error is None else f"{type(error).__name__}: {error}")
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
        done: Result = self._gather(self.together(lambda: work() if first == self.rank else None))[first]
        return done

    def _gather(self, value: Any) -> list[Any]:
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._exchange(SIZES, torch.tensor([len(mine)]))]
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
        return [pickle.loads(part.numpy().tobytes()) for part in self._exchange(OBJECTS, padded)]


class Gloo:
    """torch.distributed's transport, which reaches other hosts."""

    def __init__(self, group: dist.ProcessGroup, count: int):
        self._group = group
        self._count = count

    def exchange(self, kind: int, mine: Tensor) -> list[Tensor]:
        """See `Transport`.

        Raises:
            OutOfStepError: if another process exchanges something else, or has ended.
        """
        # What is summed and joined follows from inputs that were compared.
        if kind not in (SUM, JOIN):
            headers = self._all_gather(torch.tensor([kind, mine.nbytes]))
            for rank, header in enumerate(headers):
                if not torch.equal(header, headers[0]):
                    raise OutOfStepError(
                        f"Process {rank} is not where process 0 is: every process must make the same calls with the "
                        "same arguments. Start them again."
                    )
        return self._all_gather(mine)

    def _all_gather(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self._count)]
        try:
            dist.all_gather(parts, mine, group=self._group)
        except RuntimeError as error:
            raise OutOfStepError(
                f"Another process has ended or failed, and its own message says why ({error}). Start the processes "
                "again."
            ) from error
        return parts


def process_count() -> int:
    """How many processes were started together, by torchrun, accelerate launch or alike; 1 if this one is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_degree(tp_degree: int) -> int:
    """How many of the ranks each process holds.

    Raises:
        TargetError: if they cannot hold equally many.
    """
    count = process_count()
    if tp_degree % count:
        suggested = -(-tp_degree // count) * count
        raise TargetError(
            f"{count} processes were started together (WORLD_SIZE={count}), and cannot hold equal shares of an export "
            f"with tp_degree={tp_degree}: export with tp_degree={suggested}, or start a number of processes that "
            f"divides {tp_degree}. (For a whole model in each process, unset WORLD_SIZE.)"
        )
    return tp_degree // count


@functools.cache
def this_world() -> Processes | None:
    """The processes that were started together, connected; None if this one is alone. All must call it.

    torch.distributed is initialised from the environment, with gloo, if nobody has done so.
    """
    if process_count() == 1:
        return None
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, count = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(value: Result) -> list[Result]:
        gathered: list[Any] = [None] * count
        dist.all_gather_object(gathered, value, group=group)
        return gathered

    package = logging.getLogger("optimum_opt_trn")
    if rank and package.level == logging.NOTSET:
        package.setLevel(logging.ERROR)  # one process's warnings are enough
    # torchrun's number of the host, since containers may have one name.
    hosts = gather(f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}")
    connected = None
    if len(set(hosts)) == 1:
        scratch = gather(tempfile.mkdtemp(prefix="optimum_opt_trn-") if rank == 0 else "")[0]
        connected = sockets.connect(rank, count, Path(scratch), lambda well: all(gather(well)))
        gather(None)
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return Processes(rank, hosts, connected or Gloo(group, count))
