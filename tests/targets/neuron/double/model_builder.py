"""neuronx_distributed.trace.model_builder as the package uses it, with the signatures of NxD 0.15 to 0.18.

Traces every graph of rank 0 with torch.jit.trace; what comes out is saved and loaded as NxD's own model is, and runs
every rank with its own weights and states. Raises where NxD does, and where NxD would go wrong without a word.
"""

import io
import os
import shutil
import warnings
from typing import Dict, List, Tuple  # noqa: UP035  TorchScript's spelling

import torch
from torch import Tensor, nn

from . import runtime


class BaseModelInstance:
    def __init__(self, module_cls, input_output_aliases):
        self.module_cls = module_cls
        self.module = None
        self.input_output_aliases = [input_output_aliases]

    def load_module(self):
        self.module = self.module_cls()

    def get(self, bucket_rank, **kwargs):
        return self.module, self.input_output_aliases[0]


class NxDModel(nn.Module):
    weights: List[Dict[str, Tensor]]  # noqa: UP006
    state: List[Dict[str, Tensor]]  # noqa: UP006
    neffs: List[Tensor]  # noqa: UP006
    input_shape_map: Dict[str, int]  # noqa: UP006
    input_examples: List[List[Tensor]]  # noqa: UP006
    weight_examples: Dict[str, Tensor]  # noqa: UP006
    weight_shapes: Dict[str, List[int]]  # noqa: UP006
    state_names: List[str]  # noqa: UP006
    state_zeros: List[Tensor]  # noqa: UP006

    def __init__(self, neffs, shapes, examples, weights: dict[str, Tensor], states: dict[str, Tensor], size: int):
        super().__init__()
        # Empty tensors stand for dtypes.
        self.input_examples = [[tensor[..., :0].flatten() for tensor in inputs] for inputs in examples]
        self.weight_examples = {name: tensor.new_empty(0) for name, tensor in weights.items()}
        weight_shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        self.neffs, self.input_shape_map, self.weight_shapes = neffs, shapes, weight_shapes
        self.state_names, self.state_zeros = list(states), list(states.values())
        self.size = size
        self.weights = [{"": torch.zeros(0)}]
        self.state = [{"": torch.zeros(0)}]
        self.initialized = False

    @torch.jit.export
    def initialize_with_saved_weights(self, start_rank_tensor: Tensor):
        if len(self.weights) != self.size:
            raise RuntimeError("weights of some ranks are missing")
        state: List[Dict[str, Tensor]] = []  # noqa: UP006
        for rank in range(self.size):
            for name, shape in self.weight_shapes.items():
                if name not in self.weights[rank]:
                    raise RuntimeError(f"rank {rank}: there is no weight {name}")
                weight = self.weights[rank][name]
                if weight.shape != shape or weight.dtype != self.weight_examples[name].dtype:
                    raise RuntimeError(f"rank {rank}: {name} has another shape or dtype than it was compiled with")
            zeros: Dict[str, Tensor] = {}  # noqa: UP006
            for name, zero in zip(self.state_names, self.state_zeros):  # noqa: B905
                zeros[name] = torch.zeros_like(zero)
            state.append(zeros)
        self.state = state
        self.initialized = True

    def forward(self, inputs: List[Tensor]) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        shapes = str([tensor.shape for tensor in inputs])
        if shapes not in self.input_shape_map:
            raise ValueError("Input shape not found in input_shape_map")
        if not self.initialized:
            raise ValueError("This model is not initialized")
        graph = self.input_shape_map[shapes]
        for given, example in zip(inputs, self.input_examples[graph]):  # noqa: B905
            if given.dtype != example.dtype:
                raise ValueError("Input of another dtype than it was compiled with")
        parameters: List[Tensor] = []  # noqa: UP006
        for rank in range(self.size):
            for name in self.weight_shapes.keys():  # noqa: SIM118
                parameters.append(self.weights[rank][name])
            for name in self.state_names:
                parameters.append(self.state[rank][name])
        weights = len(self.weight_shapes)
        states = [weights + place for place in range(len(self.state_names))]
        results = torch.ops.neuron_double.run(self.neffs[graph], inputs, parameters, states, self.size)
        return results[0], results[1]


class NxDModelExecutor(nn.Module):
    """Takes as many arguments as it was traced with, as NxD's does."""

    def __init__(self, nxd_model):
        super().__init__()
        self.nxd_model = nxd_model

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return self.nxd_model([a, b, c, d, e, f])


class ModelBuilder:
    def __init__(
        self,
        router,
        tp_degree,
        checkpoint_loader,
        start_rank_id=0,
        pp_degree=1,
        ep_degree=1,
        local_ranks_size=None,
        world_size=None,
        compiler_workdir=None,
        master_proc_env_vars=None,
        debug=False,
        num_cores_per_group=1,
        init_custom_process_group_fn=None,
        logical_nc_config=1,
        weights_to_skip_layout_optimization=frozenset(),
    ):
        self.tp_degree = tp_degree
        self.compiler_workdir = compiler_workdir
        self.logical_nc_config = logical_nc_config
        self.models: dict[str, tuple] = {}

    def add(
        self, key, model_instance, example_inputs, compiler_args=None, bucket_config=None, priority_model_idx=None
    ):
        self.models[key] = (model_instance, example_inputs, compiler_args)
        return self

    def trace(self, initialize_model_weights=True, dry_run=False):
        if initialize_model_weights:
            raise NotImplementedError("the double does not load weights when it traces")
        if os.path.exists(self.compiler_workdir):
            shutil.rmtree(self.compiler_workdir)
        os.makedirs(self.compiler_workdir)
        if self.tp_degree == 4:
            # NxD 0.15 looks it up for four ranks on trn1, and divides by it.
            assert int(os.environ["LOCAL_WORLD_SIZE"]) // self.tp_degree == 1
        runtime.world_size = self.tp_degree
        neffs, shapes, calls, weights, states, results = [], {}, [], {}, {}, None
        for key, (instance, examples, arguments) in self.models.items():
            target = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
            if f"--target {target}" not in arguments or f"--lnc={self.logical_nc_config}" not in arguments:
                raise RuntimeError(f"neuronx-cc was called for {target} with {arguments}")
            instance.load_module()
            for bucket, inputs in enumerate(examples):
                module, aliases = instance.get(bucket)
                names = {id(parameter): name for name, parameter in module.named_parameters()}
                if any(id(tensor) not in names for tensor in aliases):
                    raise KeyError("an alias is no parameter of the module")
                order = sorted((index, names[id(tensor)]) for tensor, index in aliases.items())
                own_states = [name for _, name in order]
                own_weights = [name for name in names.values() if name not in own_states]
                traced, count = self._trace(module, [*own_weights, *own_states], inputs)
                if [index for index, _ in order] != [*range(count - len(order), count)]:
                    raise IndexError(f"{key}: the aliased results are not the last of {count}")
                if results not in (None, count - len(order)):
                    raise RuntimeError(f"{key} returns another structure than the graphs before it")
                results = count - len(order)
                shape = str([list(tensor.shape) for tensor in inputs])
                if shape in shapes:
                    raise AssertionError(f"{key}: NxD would serve calls of {shape} by this graph alone")
                shapes[shape] = len(neffs)
                neffs.append(traced)
                calls.append(inputs)
                found = {name: module.get_parameter(name) for name in (*own_weights, *own_states)}
                if weights and (list(weights) != own_weights or list(states) != own_states):
                    raise RuntimeError(f"{key} has other weights or states than the graphs before it")
                weights = {name: found[name].detach() for name in own_weights}
                states = {name: found[name].detach() for name in own_states}
                del module, aliases, found  # as NxD, which makes graphs in a function of their own
        runtime.world_size = 1
        model = torch.jit.script(NxDModel(neffs, shapes, calls, weights, states, self.tp_degree))
        return torch.jit.script(NxDModelExecutor(model))

    @staticmethod
    def _trace(module, names, inputs) -> tuple[Tensor, int]:
        arguments = (*inputs, *(module.get_parameter(name).detach() for name in names))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def graph(*given: Tensor) -> tuple[Tensor, ...]:
                # Parameters are arguments of what is compiled, not part of it.
                own = dict(module._parameters)
                module._parameters.update(zip(names, given[len(inputs) :], strict=True))
                try:
                    return module(*given[: len(inputs)])
                finally:
                    module._parameters.update(own)

            traced = torch.jit.trace(graph, arguments, check_trace=False, strict=False)
            count = len(traced(*arguments))
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer)
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8), count
