"""GRAPH_VERSION follows the graphs: a change of what they compute fails here until it is raised.

Run by test_target.py, on the double of the SDK.

python tests/targets/neuron/graph_version_cases.py  # writes graph_version.json anew, after GRAPH_VERSION was raised
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import double


double.install()

from neuron_switches import SWITCHES, switched  # noqa: E402
from small_models import KINDS, tiny_config  # noqa: E402

from optimum_opt_trn import OPTNeuronConfig  # noqa: E402
from optimum_opt_trn.checkpoint.layout import layer_specs, outer_specs  # noqa: E402
from optimum_opt_trn.checkpoint.quantization import quantization_config  # noqa: E402
from optimum_opt_trn.dtypes import to_torch  # noqa: E402
from optimum_opt_trn.model.shapes import cache_shape, shard_dim  # noqa: E402
from optimum_opt_trn.targets.neuron import builder  # noqa: E402
from optimum_opt_trn.targets.neuron.artifacts import GRAPH_VERSION  # noqa: E402
from optimum_opt_trn.targets.neuron.rank_module import RANKS, DeviceOperators, RankModule, example_inputs  # noqa: E402


RECORD = Path(__file__).with_name("graph_version.json")
TP_DEGREE = 2

# torch-xla compares the indices of these with a 64-bit zero.
WIDE = ("aten.index.Tensor", "aten.index_put")

# Writes to a cache, which are aliased. Other operations are not to have a result of a cache's shape.
UPDATES = ("aten.scatter", "neuron_double.dynamic_update_slice")


class Operations(TorchDispatchMode):
    """Notes each operation with the shapes and dtypes of its arguments and results.

    Args:
        cache: the shape of a layer's keys or values; operations that move one are noted in `moved`.
    """

    def __init__(self, cache: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.cache = cache
        self.noted: list[str] = []
        self.wide: set[str] = set()
        self.moved: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        leaves = tree_leaves((arguments, keywords, result))
        if str(function).startswith(WIDE) or any(
            isinstance(x, torch.Tensor) and x.dtype == torch.int64 for x in leaves
        ):
            self.wide.add(str(function))
        # A view moves nothing.
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.shape == self.cache]
        if not str(function).startswith(UPDATES) and any(x.untyped_storage().data_ptr() not in given for x in made):
            self.moved.add(str(function))
        described = [(tuple(x.shape), str(x.dtype)) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.noted.append(f"{function} {described}")
        return result


def shapes_of(config, neuron_config) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """One rank's weights by the names that graphs give them, from the layout of the checkpoint."""
    amp, weight_dtype = neuron_config.amp, neuron_config.weight_dtype
    shapes = {RANKS: (torch.Size([1]), torch.int32)}
    parts = [(f"layer_{i}", layer_specs(config, amp, weight_dtype)) for i in range(config.num_hidden_layers)]
    for part, specs in [("outer", outer_specs(config, amp, weight_dtype)), *parts]:
        for name, spec in specs.items():
            shape, dim = list(spec.shape), shard_dim(name)
            if dim is not None:
                shape[dim] = -(-shape[dim] // TP_DEGREE)
            name = name.removeprefix("model.decoder.")
            outer = "embed" if name.startswith(("embed", "project_in")) else "head"
            shapes[f"{outer if part == 'outer' else part}__{name.replace('.', '__')}"] = (
                torch.Size(shape),
                to_torch(spec.dtype),
            )
    return shapes


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The SDK's operator in place of torch's, whose places are 64-bit."""
    return torch.ops.neuron_double.top_k(x, k)


def graphs() -> dict[str, str]:
    """A hash of the operations of each graph, for every kind of OPT, and with int8 weights."""
    return {name: hashlib.sha256("\n".join(o.noted).encode()).hexdigest()[:16] for name, o in operations().items()}


def operations() -> dict[str, Operations]:
    """The operations of each graph, for every kind of OPT, and with int8 weights."""
    found = {}
    # Exports of earlier versions with int8 layers and a head in `amp` run on the graphs that they were compiled to.
    int8 = {"int8": {}, "int8, head in amp": {"quantization_config": quantization_config(head=False)}}
    for kind, overrides in {**KINDS, **int8}.items():
        config = tiny_config(**overrides)
        buckets = {"prompt_buckets": (16, 48), "cache_buckets": (24, 48)}
        neuron_config = OPTNeuronConfig(
            batch_size=3, sequence_length=48, tp_degree=TP_DEGREE, instance_type="inf2", **buckets,
            weight_dtype="int8" if kind in int8 else None,
        )  # fmt: skip
        for graph, examples in example_inputs(config, neuron_config).items():
            module = RankModule(
                graph, config, neuron_config, shapes_of(config, neuron_config),
                DeviceOperators(
                    lambda x: x.clone(), lambda x: torch.cat([x] * TP_DEGREE, dim=-1),
                    builder.put_slot, top_k,
                ),
            )  # fmt: skip
            with torch.no_grad(), Operations(cache_shape(config, neuron_config)) as noted:
                for arguments in examples:
                    module(*arguments)
            found[f"{kind}: {graph}"] = noted
    return found


def test_a_changed_graph_has_a_new_version():
    record = json.loads(RECORD.read_text())
    if record["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"the record is of torch {record['torch']}, which may decompose operations differently")
    assert graphs() == record["graphs"] and record["version"] == GRAPH_VERSION, (
        "The graphs differ from those of the recorded version: raise GRAPH_VERSION (targets/neuron/artifacts.py), and "
        f"run {Path(__file__).name} as a script."
    )


def test_no_graph_has_64_bit_integers():
    assert not set().union(*(noted.wide for noted in operations().values()))


def test_no_graph_moves_a_whole_cache():
    assert not set().union(*(noted.moved for noted in operations().values()))


def test_a_moved_cache_is_noticed():
    cache, rows = torch.zeros(3, 2, 8, 4), torch.tensor([2, 0, 1], dtype=torch.int32)
    mask = torch.ones(8, 1, dtype=torch.bool)
    for operation in (lambda: cache.index_select(0, rows), lambda: torch.where(mask, cache, cache), lambda: cache + 1):
        with Operations((3, 2, 8, 4)) as noted:
            operation()
        assert noted.moved
    with Operations((3, 2, 8, 4)) as noted:
        cache[:, :, :8], builder.put_slot(cache, cache.index_select(0, rows[:1]), rows[1:2])
    assert not noted.moved


def test_64_bit_integers_are_noticed():
    x, places = torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32)
    for operation in (lambda: x.index_put((places,), x[:2]), lambda: x[places], lambda: torch.topk(x, 2)):
        with Operations() as noted:
            operation()
        assert noted.wide
    with Operations() as noted:
        x.index_select(0, places), x.scatter(0, places[:, None], x[:2])
    assert not noted.wide


def test_every_change_of_a_graph_is_noticed(monkeypatch):
    from optimum_opt_trn.model.arithmetic import Arithmetic

    before = graphs()
    monkeypatch.setattr(Arithmetic, "layer_norm", lambda self, x, norm: x)
    after = graphs()
    assert {name for name in before if before[name] == after[name]} == {
        name for name in before if name.endswith("cache_copy")
    }


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_of_the_example_changes_what_it_says(switch):
    def compiled() -> dict[str, str]:
        config = OPTNeuronConfig(instance_type="trn1")
        return {graph: builder.compiler_arguments(config, graph) for graph in example_inputs(tiny_config(), config)}

    before, arguments = graphs(), compiled()
    with switched(switch):
        after, other_arguments = graphs(), compiled()
    changed = {name.rpartition(": ")[2] for name in before if before[name] != after[name]}
    decoding = {"token_generation", "speculation"}
    all_but_copy = {"context_encoding", *decoding}
    assert changed == {
        "attention_after_write": decoding, "all_reduce_f32": all_but_copy, "topk_whole_vocabulary": all_but_copy,
        "context_O2": set(),
    }[switch]  # fmt: skip
    differing = {graph for graph in arguments if arguments[graph] != other_arguments[graph]}
    assert differing == ({"context_encoding"} if switch == "context_O2" else set())
    assert graphs() == before


if __name__ == "__main__":
    version = torch.__version__.partition("+")[0]
    RECORD.write_text(json.dumps({"version": GRAPH_VERSION, "torch": version, "graphs": graphs()}, indent=2) + "\n")
