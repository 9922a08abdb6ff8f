"""What libneuronpjrt and the runtime do for a compiled model, on the host: ranks are threads that meet at barriers.

A "NEFF" is the TorchScript of a traced graph. Tensors "on a core" are copies in host memory, which nobody else has.
"""

from __future__ import annotations

import functools
import io
import threading
import weakref

import torch
from torch import Tensor


# How many ranks the graphs that are being traced have.
world_size = 1

_rank = threading.local()


class World:
    """Ranks in lockstep: each collective takes a part from every one of them."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size)
        self.parts: list[Tensor | None] = [None] * size

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self.parts[_rank.index] = tensor
        self.barrier.wait(timeout=120)
        parts = list(self.parts)
        self.barrier.wait(timeout=120)
        return parts


class Staging:
    """Bytes on the host that were handed over to the cores: what of them was alive at the same time, at most."""

    def __init__(self):
        self.handed: list[tuple[weakref.ref, int]] = []
        self.peak = 0

    def hand(self, tensors: list[Tensor]) -> None:
        self.handed = [(ref, size) for ref, size in self.handed if ref() is not None]
        # What all ranks share is there once.
        once = {tensor.data_ptr(): tensor for tensor in tensors}
        self.handed += [(weakref.ref(tensor), tensor.nbytes) for tensor in once.values()]
        self.peak = max(self.peak, sum(size for _, size in self.handed))


staging = Staging()


def all_reduce(x: Tensor) -> Tensor:
    world = getattr(_rank, "world", None)
    if world is None:  # tracing
        return x.clone()
    return functools.reduce(torch.add, world.exchange(x)).clone()


def all_gather(x: Tensor, size: int) -> Tensor:
    world = getattr(_rank, "world", None)
    return torch.cat([x] * size if world is None else world.exchange(x), dim=-1)


def parallel_load(checkpoint: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    staging.hand([tensor for tensors in checkpoint for tensor in tensors.values()])
    return [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in checkpoint]


def run(neff: Tensor, inputs: list[Tensor], parameters: list[Tensor], states: list[int], size: int) -> list[Tensor]:
    """One step of every rank; what rank 0 returns beside states.

    `parameters` has all of rank 0's, then rank 1's and so on; `states` says which of a rank's are states, in the order
    in which the graph returns them, last. They are overwritten with what it returns.
    """
    graph, count = _graph(bytes(neff.numpy().tobytes())), len(parameters) // size
    world = World(size)
    results: list[tuple[Tensor, ...] | BaseException] = [()] * size

    def step(rank: int) -> None:
        _rank.index, _rank.world = rank, world
        try:
            with torch.no_grad():
                results[rank] = graph(*inputs, *parameters[rank * count : (rank + 1) * count])
        except BaseException as error:  # told to the caller; the others need not wait
            results[rank] = error
            world.barrier.abort()

    threads = [threading.Thread(target=step, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    for rank, result in enumerate(results):
        for place, new in zip(states, result[len(result) - len(states) :], strict=True):
            parameters[rank * count + place].copy_(new)
    return [tensor.clone() for tensor in results[0][: len(results[0]) - len(states)]]


@functools.lru_cache(maxsize=64)
def _graph(neff: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(io.BytesIO(neff))


_libraries = [torch.library.Library("neuron", "DEF"), torch.library.Library("neuron_double", "DEF")]
for library, schema, function in (
    (_libraries[0], "_parallel_load(Dict(str, Tensor)[] checkpoint) -> Dict(str, Tensor)[]", parallel_load),
    (_libraries[1], "all_reduce(Tensor x) -> Tensor", all_reduce),
    (_libraries[1], "all_gather(Tensor x, int size) -> Tensor", all_gather),
    (
        _libraries[1],
        "run(Tensor neff, Tensor[] inputs, Tensor(a!)[] parameters, int[] states, int size) -> Tensor[]",
        run,
    ),
):
    library.define(schema)
    library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
