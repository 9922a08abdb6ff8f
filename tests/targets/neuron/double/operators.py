"""torch_neuronx.xla_impl.ops as the package uses it: operators of neuronx-cc, on the host.

`xla_hlo_call` has a function make HLO instructions of what stands for tensors there. Here these are the tensors, and
the one instruction that is known is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TopK:
    """As NxD's operators/topk.py calls it."""

    @staticmethod
    def apply(tensor: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        if dim not in (-1, tensor.dim() - 1):
            raise TypeError("this TopK takes the last dimension only")
        return torch.ops.neuron_double.top_k(tensor, k)


class _Shape:
    """`dtype[sizes]` there, which makes instructions whose results have this shape."""

    def __getitem__(self, sizes: tuple[int, ...]) -> _Shape:
        return self

    @staticmethod
    def DynamicUpdateSlice(operand: _Operand, update: _Operand, *start: _Operand) -> Tensor:  # noqa: N802
        starts = [index.tensor for index in start]
        if len(starts) != operand.tensor.dim() or any(s.dim() or s.dtype != torch.int32 for s in starts):
            raise TypeError("DynamicUpdateSlice takes an int32 scalar for each dimension")
        if operand.tensor.dtype != update.tensor.dtype:
            raise TypeError("DynamicUpdateSlice takes an update of the operand's dtype")
        return torch.ops.neuron_double.dynamic_update_slice(operand.tensor, update.tensor, starts)


class _Operand:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.dtype, self.sizes = _Shape(), tuple(tensor.shape)


def xla_hlo_call(function: Any) -> Any:
    return lambda *tensors: function(*map(_Operand, tensors))


def dynamic_update_slice(operand: Tensor, update: Tensor, start: list[Tensor]) -> Tensor:
    result = operand.clone()
    # As in XLA, a slice that would reach beyond the end is moved to fit.
    shapes = zip(start, operand.shape, update.shape, strict=True)
    starts = [min(max(int(first), 0), size - part) for first, size, part in shapes]
    result[tuple(slice(first, first + part) for first, part in zip(starts, update.shape, strict=True))] = update
    return result


def top_k(tensor: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, places = torch.topk(tensor, k)
    return best, places.to(torch.int32)


_library = torch.library.Library("neuron_double", "FRAGMENT")
_library.define("dynamic_update_slice(Tensor operand, Tensor update, Tensor[] start) -> Tensor")
_library.impl("dynamic_update_slice", dynamic_update_slice, "CompositeExplicitAutograd")
_library.define("top_k(Tensor tensor, int k) -> (Tensor, Tensor)")
_library.impl("top_k", top_k, "CompositeExplicitAutograd")
