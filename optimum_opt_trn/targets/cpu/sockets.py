"""Exchange between the processes of one host, over Unix sockets.

A decoding step of OPT-1.3B exchanges 8 KB fifty times. Between two processes on two cores, torch.distributed's gloo
took 300 µs for each all-reduce (120 µs for a send and a receive), most of it waking threads; two sockets that are
polled take 4 µs (docs/multiprocess.md).
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


# What is waited for by polling, at most, before the process sleeps: longer than steps of equal work differ.
SPIN_SECONDS = 0.002

# Before each message: what it is for, and its bytes.
_HEADER = struct.Struct("<QQ")


class OutOfStepError(RuntimeError):
    """The processes do not run the same calls, or one of them has ended; the message says which."""


class Sockets:
    """Connections of this process to each other one of its host.

    Args:
        rank: of this process.
        peers: rank → connected stream socket, of all others.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket]):
        self._rank = rank
        self._peers = peers
        for connection in peers.values():
            connection.setblocking(False)

    def exchange(self, kind: int, mine: Tensor) -> list[Tensor]:
        """Every process's tensor, in the order of their ranks.

        Args:
            kind: what is exchanged; the same in every process, as is the tensor's size.
            mine: contiguous; returned as this process's.

        Raises:
            OutOfStepError: if another process exchanges something else, or has ended. All connections are then closed,
                so that no process waits for this one.
        """
        parts = [mine if rank == self._rank else torch.empty_like(mine) for rank in range(len(self._peers) + 1)]
        header = _HEADER.pack(kind, mine.nbytes)
        payload = _bytes(mine)
        try:
            open_ends = [
                _Transfer(rank, peer, header, payload, _bytes(parts[rank])) for rank, peer in self._peers.items()
            ]
            waiting_since = None
            while open_ends:
                moved = False
                for end in open_ends:
                    moved |= end.move()
                if moved:
                    open_ends = [end for end in open_ends if not end.done]
                    waiting_since = None
                elif waiting_since is None:
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since < SPIN_SECONDS:
                    os.sched_yield()  # where there are fewer cores than processes
                else:
                    _sleep(open_ends)
        except BaseException:
            self.close()
            raise
        return parts

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()


class _Transfer:
    """One message to a peer and one from it."""

    def __init__(self, rank: int, peer: socket.socket, header: bytes, payload: memoryview, into: memoryview):
        self._rank, self.peer = rank, peer
        self._expected, self._received = header, bytearray(_HEADER.size)
        self.out = [memoryview(header), payload]
        self.into = [memoryview(self._received), into]
        self._checked = False

    @property
    def done(self) -> bool:
        return not self.out and not self.into

    def move(self) -> bool:
        """Sends and receives what can be without waiting; whether there was anything."""
        moved = False
        try:
            if self.out:
                self.out = _rest(self.out, self.peer.sendmsg(self.out))
                moved = True
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._ended() from error
        try:
            if self.into:
                count = self.peer.recvmsg_into(self.into)[0]
                if not count:
                    raise self._ended()
                self.into = _rest(self.into, count)
                moved = True
        except BlockingIOError:
            pass
        except OSError as error:
            raise self._ended() from error
        if not self._checked and len(self.into) < 2:
            self._check()
        return moved

    def _check(self) -> None:
        self._checked = True
        if self._received != self._expected:
            (kind, size), (other, other_size) = _HEADER.unpack(self._expected), _HEADER.unpack(self._received)
            what = f"message {other} of {other_size} bytes where {kind} of {size} was due"
            raise OutOfStepError(
                f"Process {self._rank} is not where this one is ({what}): every process must make the same calls "
                "with the same arguments. Start them again."
            )

    def _ended(self) -> OutOfStepError:
        return OutOfStepError(
            f"Process {self._rank} has ended or failed; its own message says why. Start the processes again."
        )


def connect(rank: int, count: int, directory: Path, all_well: Callable[[bool], bool]) -> Sockets | None:
    """Connects the processes that see `directory`; None in all of them if one cannot.

    Args:
        directory: where sockets can be made.
        all_well: tells the other processes whether this one can go on, waits for them, and says whether all can.
    """
    peers: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind(str(directory / str(rank)))
            server.listen(count)
            well = True
        except OSError:  # not to be seen from here, or its name is too long
            well = False
        if not all_well(well):
            return None
        try:
            for other in range(rank):
                peers[other] = socket.socket(socket.AF_UNIX)
                peers[other].connect(str(directory / str(other)))
                peers[other].sendall(rank.to_bytes(4, "little"))
        except OSError:
            well = False
        if not all_well(well):
            for peer in peers.values():
                peer.close()
            return None
        while len(peers) < count - 1:
            peer = server.accept()[0]
            peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
    return Sockets(rank, peers)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _rest(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers after `count` bytes."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers[0])
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if count else buffers


def _sleep(open_ends: list[Any]) -> None:
    poll = select.poll()
    for end in open_ends:
        poll.register(end.peer, (select.POLLOUT if end.out else 0) | (select.POLLIN if end.into else 0))
    poll.poll()
