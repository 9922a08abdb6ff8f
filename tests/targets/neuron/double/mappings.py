"""neuronx_distributed.parallel_layers.mappings as the package uses it."""

import torch

from . import runtime


def reduce_from_tensor_model_parallel_region(input_, process_group=None):
    return torch.ops.neuron_double.all_reduce(input_)


def gather_from_tensor_model_parallel_region(input_, process_group=None):
    return torch.ops.neuron_double.all_gather(input_, runtime.world_size)
