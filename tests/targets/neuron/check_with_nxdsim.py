"""The Neuron target through unmodified neuronx-distributed, traced to XLA's HLO and run on several ranks on a CPU.

To be run by hand, in an environment with what nxdsim's README lists, jax 0.7.2 (jaxlib needs it to hand bfloat16 back)
and this package's dependencies:

    python tests/targets/neuron/check_with_nxdsim.py --nxdsim DIR --nxd DIR

nxdsim stands in for the closed half of the Neuron SDK; NxD is a checkout of neuronx-distributed (0.15 to 0.18). Each
row of the table is one small model: exported, saved, loaded, and asked for tokens in these ways. This tells whether
graphs can be traced, whether shards, ranks and aliased states come out right, and what is in the HLO; not whether
neuronx-cc accepts it. Exit status: 1 if a row fails; 0 otherwise, and where nxdsim or NxD are not to be had.

- greedy: ragged prompts, in either prompt bucket, and from one cache bucket into the other. `tokens` counts those that
  are not the CPU target's at f32; at 16 bits, those that are worse than transformers' best by more than the tolerance.
- error: the largest difference of a logit from transformers' (float32, on the same rounded weights), in standard
  deviations of its logits, each step given the same tokens; a cache that is gone on with included.
- sampled: the same seed on both targets, tokens that differ; told, but not judged, at 16 bits.
- beams: two beams, which copy slots, likewise.

With --weight_dtype int8 the same of int8 weights, whose reference has them multiplied out in float32; the matrices
have to be int8 in the graphs, too.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path


BATCH, SEQUENCE, BUCKETS, NEW = 2, 32, (16, 32), 9

# Largest error allowed: f32 differs by the order of sums alone; at 16 bits products and cache are rounded, where
# bf16's step is 8 times f16's.
TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "bf16": 8e-2}

# The family's kinds, as changes to the small configuration in `make_model`. 203 words divide neither by 2 nor by 4.
# There are 4 heads, with eight ranks 8.
KINDS: dict[str, dict] = {
    "pre-LN": {},
    "pre-LN, odd, untied": {"vocab_size": 203, "tie_word_embeddings": False},
    "post-LN, odd, projections": {"vocab_size": 203, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "Galactica-like": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "no final LN": {"_remove_final_layer_norm": True},
}


def prepare() -> argparse.Namespace:
    """Makes the simulator, NxD and this repository importable; where they are not to be had, ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nxdsim", type=Path, default=Path("nxdsim"), metavar="DIR", help="the simulator")
    parser.add_argument("--nxd", type=Path, default=Path("neuronx-distributed"), metavar="DIR", help="a checkout")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(default: all)")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    parser.add_argument("--amp", nargs="+", default=list(TOLERANCE), choices=TOLERANCE, help="(default: all)")
    parser.add_argument("--weight_dtype", choices=["int8"], help="(default: that of --amp)")
    options = parser.parse_args()
    folders = (options.nxdsim, options.nxd / "src", Path(__file__).parents[3], Path(__file__).parent)
    sys.path[:0] = [str(folder.resolve()) for folder in folders]
    # The simulator compiles a C++ shim when first used; its own folder may be read-only.
    build = Path(os.environ.setdefault("NXDSIM_BUILD", str(Path(tempfile.gettempdir(), "nxdsim-build"))))
    build.mkdir(parents=True, exist_ok=True)
    os.environ.update(PJRT_DEVICE="CPU", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    try:
        import jax  # noqa: F401
        import nxdsim  # noqa: F401
        from neuronx_distributed.trace import model_builder  # noqa: F401
    except ImportError as error:
        print(f"Skipped: {error}. Give --nxdsim and --nxd.")
        sys.exit(0)
    return options


def complete_the_sdk() -> str:
    """Adds what the simulator has not: an SDK that optimum-neuron finds, a host with cores; NxD's version.

    optimum-neuron's own parts stay as they are without an SDK. Its compile cache is left out.
    """
    import contextlib
    import importlib.metadata

    from neuronx_distributed._version import __version__ as version

    known = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "neuronx_distributed" else known(name)
    from optimum_opt_trn import targets
    from optimum_opt_trn.targets.neuron import builder, host

    targets.is_neuronx_available = lambda: True
    builder.hub_neuronx_cache = lambda entry: contextlib.nullcontext()
    host.get_neuron_major = lambda: 1
    host.current_instance_type = lambda: "trn1"
    host.get_neuron_devices_count = lambda: 12
    host.cores_per_device = lambda: 2
    complete_operators(builder)
    return version


def complete_operators(builder) -> None:
    """The HLO instructions that the package or the SDK makes by itself, which the simulator has not, by torch-xla."""
    import torch
    from torch_xla.core import xla_builder, xla_op_registry

    def dynamic_update_slice(cache, new, *start):
        return xla_builder.Op.dynamic_update_slice(cache, new, list(start))

    def sort(x, places):
        scalars = [xla_builder.mkshape(operand.shape().dtype, ()) for operand in (x, places)]
        descending = xla_builder.create_computation(
            "descending", lambda a, b, i, j: a > b, [shape for shape in scalars for _ in range(2)]
        )
        return xla_builder.Op.sort((x, places), descending, dimension=1, is_stable=True)

    sorted_by_value = xla_op_registry.register("sort", sort)

    class TopK:
        """The simulator's own is torch.topk, whose places are 64-bit integers."""

        @staticmethod
        def apply(x, k, dim):
            places = torch.arange(x.shape[dim], dtype=torch.int32, device=x.device).expand_as(x)
            return tuple(part[:, :k] for part in sorted_by_value(x, places))

    builder._dynamic_update_slice = xla_op_registry.register("dynamic_update_slice", dynamic_update_slice)
    builder.TopK = TopK


OPTIONS = prepare()
NXD_VERSION = complete_the_sdk()

import torch  # noqa: E402
from graph_report import TYPES, report_graph, table  # noqa: E402
from opcodes import ALLOWED  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import OPTConfig, OPTForCausalLM  # noqa: E402
from transformers.modeling_utils import no_init_weights  # noqa: E402

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig  # noqa: E402
from optimum_opt_trn.model.shapes import cache_shape  # noqa: E402
from optimum_opt_trn.targets.neuron import builder as neuron_builder  # noqa: E402
from optimum_opt_trn.targets.neuron import process  # noqa: E402


torch.set_num_threads(1)


class Recorder:
    """Keeps what NxD's builder traced for the last export: opcodes and aliases of each graph."""

    def __init__(self):
        make = neuron_builder.make_builder

        def record(*arguments):
            self.builder = make(*arguments)
            self.cache_shape = cache_shape(*arguments[:2])
            return self.builder

        neuron_builder.make_builder = record

    def modules(self, graph: str) -> list:
        return [artifacts.hlo_module for artifacts in self.builder.model_collection[graph].hlo_artifact_collection]

    def opcodes(self, graph: str) -> Counter[str]:
        """Of the longest bucket."""
        return _opcodes(self.modules(graph)[-1])

    def reports(self) -> dict:
        """What each graph has a device do; of several buckets, the shortest, in which a cache is not read whole."""
        return {
            graph: report_graph(self.modules(graph)[0], self.cache_shape) for graph in self.builder.model_collection
        }

    def unknown(self) -> set[str]:
        """Opcodes of any graph that are not in the list of those that may be there."""
        graphs = self.builder.model_collection
        return {code for graph in graphs for module in self.modules(graph) for code in _opcodes(module)} - set(ALLOWED)

    def int8_parameters(self) -> int:
        """How many weights of a decoding step are int8."""
        module = self.modules("token_generation")[-1]
        entry = next(part for part in module.computations if part.id == module.entry_computation_id)
        parameters = [i for i in entry.instructions if i.opcode == "parameter"]
        return sum(TYPES.get(i.shape.element_type) == ("s8", 1) for i in parameters)

    def aliases(self) -> set[int]:
        """How many states each graph aliases."""
        graphs = self.builder.model_collection
        return {len(module.input_output_alias.entries) for graph in graphs for module in self.modules(graph)}


def _opcodes(module) -> Counter[str]:
    # torch-xla puts an operator of its users into a function, and calls it.
    return Counter(
        instruction.opcode for part in module.computations for instruction in part.instructions
        if instruction.opcode != "call"
    )  # fmt: skip


def make_model(changes: dict, heads: int) -> OPTForCausalLM:
    sizes = {"vocab_size": 200, "hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64}
    sizes["num_attention_heads"] = heads
    config = OPTConfig(**{**sizes, "num_hidden_layers": 2, "max_position_embeddings": SEQUENCE, **changes})
    torch.manual_seed(0)
    with no_init_weights():
        model = OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "layer_norm.weight" in name else 0.0, 0.1)
    model.tie_weights()
    return model


def prompts(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = torch.randint(4, 200, (BATCH, max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


def load_reference(checkpoint: Path) -> OPTForCausalLM:
    """transformers' model in float32; what is int8 is multiplied with its scales, for which it has another package."""
    config = OPTConfig.from_pretrained(checkpoint)
    if not hasattr(config, "quantization_config"):
        return OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    del config.quantization_config
    tensors: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors.update(load_file(file))
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        matrix = name.removesuffix("_scale")
        tensors[matrix] = tensors[matrix].float() * tensors.pop(name)
    with no_init_weights():
        model = OPTForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def check(changes: dict, amp: str, tp: int, workdir: Path, recorder: Recorder) -> dict:
    """One row of the table."""
    make_model(changes, heads=max(tp, 4)).save_pretrained(workdir / "source")
    shape = {"batch_size": BATCH, "sequence_length": SEQUENCE, "prompt_buckets": BUCKETS, "cache_buckets": BUCKETS}
    shape |= {"tp_degree": tp, "amp": amp, "weight_dtype": OPTIONS.weight_dtype}
    neuron_config = OPTNeuronConfig(**shape, instance_type="inf2")
    process._claim = None  # in the simulator, models of any degree follow one another
    NeuronOPTForCausalLM.export(workdir / "source", neuron_config).save_pretrained(workdir / "export")
    neuron = NeuronOPTForCausalLM.from_pretrained(workdir / "export")
    cpu = NeuronOPTForCausalLM.from_pretrained(workdir / "source", **shape, instance_type="cpu", eager=True)
    reference = load_reference(workdir / "export" / "checkpoint")
    greedy = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1}
    detailed = {**greedy, "output_logits": True, "return_dict_in_generate": True}
    worst, wrong = 0.0, 0
    for lengths in ((11, 6), (20, 13)):
        given = prompts(lengths)
        made = neuron.generate(**given, **detailed)
        mask = torch.cat([given["attention_mask"], torch.ones(BATCH, NEW, dtype=torch.long)], dim=1)
        with torch.no_grad():
            wanted = reference(made.sequences, attention_mask=mask).logits[:, -NEW - 1 : -1]
        worst = max(worst, ((torch.stack(made.logits, dim=1) - wanted).abs().max() / wanted.std()).item())
        tokens = made.sequences[:, -NEW:]
        if amp == "f32":
            wrong += int((cpu.generate(**given, **greedy) != made.sequences).sum())
        else:
            behind = wanted.amax(-1) - wanted.gather(-1, tokens[:, :, None])[:, :, 0]
            wrong += int((behind > 2 * TOLERANCE[amp] * wanted.std()).sum())
    # A cache that is gone on with, by several tokens.
    given, split = prompts((14, 9)), 8
    mask = given["attention_mask"]
    past = neuron(given["input_ids"][:, :split], attention_mask=mask[:, :split]).past_key_values
    logits = neuron(given["input_ids"][:, split:], attention_mask=mask, past_key_values=past).logits
    with torch.no_grad():
        wanted = reference(given["input_ids"], attention_mask=mask).logits[:, split:]
    worst = max(worst, ((logits - wanted).abs().max() / wanted.std()).item())
    sampling = {**greedy, "do_sample": True, "top_k": 30, "top_p": 0.95, "temperature": 1.2}
    sampled = []
    for model in (neuron, cpu):
        torch.manual_seed(7)
        sampled.append(model.generate(**prompts((11, 6)), **sampling))
    one = {name: tensor[:1] for name, tensor in prompts((11, 6)).items()}
    beams = [model.generate(**one, **greedy, num_beams=2) for model in (neuron, cpu)]
    opcodes = recorder.opcodes("token_generation")
    return {
        "error": worst,
        "tokens": wrong,
        "sampled": int((sampled[0] != sampled[1]).sum()),
        "beams": int((beams[0] != beams[1]).sum()),
        "all-reduce": opcodes["all-reduce"],
        "all-gather": opcodes["all-gather"],
        "aliases": recorder.aliases(),
        "int8": recorder.int8_parameters(),
        "unknown": recorder.unknown(),
        "reports": recorder.reports(),
    }


def judge(row: dict, amp: str, tp: int, layers: int = 2) -> list[str]:
    """What is wrong with a row."""
    faults = []
    if not row["error"] <= TOLERANCE[amp]:
        faults.append("error")
    if row["tokens"] or (amp == "f32" and (row["sampled"] or row["beams"])):
        faults.append("tokens")
    # Two in a layer, one for the parts of the vocabulary in the embedding.
    # The head gathers logits, and the best words of each part with their numbers.
    if (row["all-reduce"], row["all-gather"]) != ((2 * layers + 1, 3) if tp > 1 else (0, 0)):
        faults.append("collectives")
    if row["aliases"] != {2 * layers}:
        faults.append("aliases")
    if row["int8"] != (6 * layers + 1 if OPTIONS.weight_dtype else 0):
        faults.append("int8 parameters")
    for graph, report in row["reports"].items():
        if report.whole_cache or report.waiting_dots:
            faults.append(f"{graph} moves or waits for a cache")
        if report.wide:
            faults.append(f"{graph} has 64-bit integers")
        if tp > 1 and report.collectives and f"all-reduce {amp}" not in report.collectives:
            faults.append(f"{graph} reduces in another dtype")
    return faults + sorted(row["unknown"])


def main() -> int:
    failed, recorder, start = False, Recorder(), time.monotonic()
    print(f"neuronx-distributed {NXD_VERSION}, torch {torch.__version__}\n")
    print("| kind | tp | amp | error, σ | allowed | tokens | sampled | beams | all-reduce | all-gather | aliases | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    opcodes: dict[str, Counter[str]] = {}
    for kind in OPTIONS.kinds:
        for tp in OPTIONS.tp:
            for amp in OPTIONS.amp:
                with tempfile.TemporaryDirectory() as workdir:
                    row = check(KINDS[kind], amp, tp, Path(workdir), recorder)
                faults = judge(row, amp, tp)
                failed |= bool(faults)
                figures = (row["tokens"], row["sampled"], row["beams"], row["all-reduce"], row["all-gather"])
                dtypes = f"{amp}, int8" if OPTIONS.weight_dtype else amp
                print(
                    f"| {kind} | {tp} | {dtypes} | {row['error']:.1e} | {TOLERANCE[amp]:.0e} | "
                    + " | ".join(map(str, figures))
                    + f" | {', '.join(map(str, row['aliases']))} | {', '.join(faults) or 'ok'} |",
                    flush=True,
                )
                reports = row["reports"]
                for graph in recorder.builder.model_collection:
                    opcodes[graph] = recorder.opcodes(graph)
    print(f"\n{time.monotonic() - start:.0f} s. Opcodes of the last row:")
    for graph, counts in opcodes.items():
        print(f"- {graph}: {', '.join(f'{code} {count}' for code, count in sorted(counts.items()))}")
    print("\nWhat the graphs of the last row have a device do:\n")
    print("\n".join(table(reports)))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
