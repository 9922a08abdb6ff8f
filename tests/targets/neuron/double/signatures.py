"""Every name of the Neuron SDK that the package touches: where the public source has it, and its parameters.

Recorded from github.com/aws-neuron/neuronx-distributed at the versions below, which agree on all of it; a later one
may have more parameters at the end. test_signatures.py checks that the package touches nothing else, that the double
has the same parameters, and, where a checkout is at hand, that the source has.
"""

from __future__ import annotations

from typing import NamedTuple


VERSIONS = ("0.15.0", "0.18.0")


class Name(NamedTuple):
    """file: below the checkout's src/. parameters: without self; None for what is no function."""

    file: str
    parameters: tuple[str, ...] | None


_BUILDER = "neuronx_distributed/trace/model_builder.py"
_MAPPINGS = "neuronx_distributed/parallel_layers/mappings.py"
_TOPK = "neuronx_distributed/operators/topk.py"
_SPMD = "neuronx_distributed/trace/spmd.py"

NAMES: dict[str, Name] = {
    "ModelBuilder": Name(
        _BUILDER,
        (
            *("router", "tp_degree", "checkpoint_loader", "start_rank_id", "pp_degree", "ep_degree"),
            *("local_ranks_size", "world_size", "compiler_workdir", "master_proc_env_vars", "debug"),
            *("num_cores_per_group", "init_custom_process_group_fn", "logical_nc_config"),
            "weights_to_skip_layout_optimization",
        ),
    ),
    "ModelBuilder.add": Name(
        _BUILDER,
        ("key", "model_instance", "example_inputs", "compiler_args", "bucket_config", "priority_model_idx"),
    ),
    "ModelBuilder.trace": Name(_BUILDER, ("initialize_model_weights", "dry_run")),
    "BaseModelInstance": Name(_BUILDER, ("module_cls", "input_output_aliases")),
    "BaseModelInstance.load_module": Name(_BUILDER, ()),
    "BaseModelInstance.get": Name(_BUILDER, ("bucket_rank", "kwargs")),
    "BaseModelInstance.module": Name(_BUILDER, None),
    "reduce_from_tensor_model_parallel_region": Name(_MAPPINGS, ("input_", "process_group")),
    "gather_from_tensor_model_parallel_region": Name(_MAPPINGS, ("input_", "process_group")),
    "NxDModelExecutor.nxd_model": Name(_SPMD, None),
    "NxDModel.weights": Name(_SPMD, None),
    "NxDModel.initialize_with_saved_weights": Name(_SPMD, ("start_rank_tensor",)),
    # Called there with a list of dictionaries, one for each rank, by name.
    "torch.ops.neuron._parallel_load": Name(_SPMD, None),
    # Called there: TopK.apply(tensor, k, dim=…).
    "TopK": Name(_TOPK, None),
    # Imported there for what it registers.
    "torch_neuronx": Name(_BUILDER, None),
}

# What the package takes from optimum-neuron for this target, and what it extends of it: recorded from the sources of
# 0.4.5 (SDK 2.26) and of branch sdk2.31 (0.4.7.dev0), which agree on these parameters. Later ones have defaults.
OPTIMUM_NEURON: dict[str, Name] = {
    "has_neuron_model_class": Name("optimum/neuron/models/auto_model.py", ("model_type", "task", "mode")),
    "register_neuron_model": Name("optimum/neuron/models/auto_model.py", ("model_type", "task", "mode")),
    "NeuronPreTrainedModel.get_neuron_config": Name(
        "optimum/neuron/models/inference/modeling_utils.py",
        (
            *("cls", "model_name_or_path", "config", "token", "revision"),
            *("instance_type", "batch_size", "sequence_length", "tensor_parallel_size"),
        ),
    ),
    "NeuronConfig.from_dict": Name("optimum/neuron/configuration_utils.py", ("cls", "config_dict")),
    "hub_neuronx_cache": Name("optimum/neuron/cache/hub_cache.py", ("entry",)),
    "SingleModelCacheEntry": Name(
        "optimum/neuron/cache/entries/single_model.py", ("model_id", "task", "config", "neuron_config")
    ),
    "get_neuron_devices_count": Name("optimum/neuron/utils/system.py", ()),
    "cores_per_device": Name("optimum/neuron/utils/system.py", ()),
    "get_neuron_major": Name("optimum/neuron/utils/system.py", ()),
    "current_instance_type": Name("optimum/neuron/utils/instance.py", ()),
    "get_neuronxcc_version": Name("optimum/neuron/utils/version_utils.py", ()),
}
