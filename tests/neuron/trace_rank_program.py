"""Traces the rank program with neuronx-distributed's ModelBuilder, runs it on a CPU, compares it with transformers.

To be run by hand (two to three minutes), in an environment with what nxdsim's README lists, jax 0.7.2 (jaxlib needs it
to hand bfloat16 back) and this package's dependencies:

    python tests/neuron/trace_rank_program.py --nxdsim DIR --nxd DIR

nxdsim stands in for the closed half of the Neuron SDK; NxD is a checkout of neuronx-distributed (0.15 to 0.18). Four
graphs, two buckets of `context_encoding` and two of `token_generation`, share weights and caches on two ranks. This
tells whether the program can be traced, whether shards, ranks and aliased states come out right, and what is in the
HLO; not whether neuronx-cc accepts that. Exit status: 1 if tokens or logits are not transformers', or the all-reduces
not two a layer; 0 otherwise, and where nxdsim or NxD are not to be had.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path


TP, BATCH, SEQUENCE, STEPS = 2, 2, 32, 12
PROMPTS, PROMPT_BUCKETS, CACHE_BUCKETS = (11, 6), (16, SEQUENCE), (16, SEQUENCE)

# Largest |difference| of logits, in standard deviations of the reference's (which has the same rounded weights):
# f32 differs by the order of sums alone, f16 by rounded activations and cache, and bf16's step is 8 times f16's.
TOLERANCE = {"f32": 1e-5, "f16": 1e-2, "bf16": 8e-2}

# The family's kinds, as changes to the small configuration in `check`. 203 words do not divide by two.
KINDS: dict[str, dict] = {
    "pre-LN": {},
    "pre-LN, odd, untied": {"vocab_size": 203, "tie_word_embeddings": False},
    "post-LN, odd, projections": {"vocab_size": 203, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "Galactica-like": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
}


def prepare() -> None:
    """Makes the simulator, NxD and this repository importable; where they are not to be had, ends the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nxdsim", type=Path, default=Path("nxdsim"), metavar="DIR", help="the simulator")
    parser.add_argument("--nxd", type=Path, default=Path("neuronx-distributed"), metavar="DIR", help="a checkout")
    options = parser.parse_args()
    folders = (options.nxdsim, options.nxd / "src", Path(__file__).parents[2])
    sys.path[:0] = [str(folder.resolve()) for folder in folders]
    # The simulator compiles a C++ shim when first used; its own folder may be read-only.
    build = Path(os.environ.setdefault("NXDSIM_BUILD", str(Path(tempfile.gettempdir(), "nxdsim-build"))))
    build.mkdir(parents=True, exist_ok=True)
    os.environ.update(PJRT_DEVICE="CPU", TQDM_DISABLE="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    try:
        import jax  # noqa: F401
        import nxdsim  # noqa: F401
        from neuronx_distributed.trace import model_builder  # noqa: F401
    except ImportError as error:
        print(f"Skipped: {error}. Give --nxdsim and --nxd.")
        sys.exit(0)


prepare()

import torch  # noqa: E402
from neuronx_distributed.parallel_layers import mappings  # noqa: E402
from neuronx_distributed.trace.model_builder import BaseModelInstance, ModelBuilder  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import OPTConfig, OPTForCausalLM  # noqa: E402
from transformers.modeling_utils import no_init_weights  # noqa: E402

from optimum_opt_trn.checkpoint import save_pretrained_split  # noqa: E402
from optimum_opt_trn.checkpoint.load import ModelWeights, load_weights  # noqa: E402
from optimum_opt_trn.configuration_opt import OPTNeuronConfig  # noqa: E402
from optimum_opt_trn.graphs import smallest_bucket  # noqa: E402
from optimum_opt_trn.kv_cache import LayerCache, cache_shape  # noqa: E402
from optimum_opt_trn.modeling_opt import OPTRankProgram, last_token  # noqa: E402
from optimum_opt_trn.parallel import RankGroup, Weights  # noqa: E402
from optimum_opt_trn.products import Products  # noqa: E402
from optimum_opt_trn.sampling import MAX_SUPPRESSED, select_tokens  # noqa: E402


def named(weights: ModelWeights) -> dict[str, Tensor]:
    """One rank's weights, by names that a parameter may have; a head that is tied to the embedding is left out."""
    layers = {f"layer_{index}": layer for index, layer in enumerate(weights.layers)}
    parts = layers | {"embed": weights.embed, "head": weights.head}
    flat = {f"{part}.{name}": shards[0].contiguous() for part, w in parts.items() for name, shards in w.items()}
    if weights.head["lm_head.weight"] is weights.embed["embed_tokens.weight"]:
        del flat["head.lm_head.weight"]
    return {name.replace(".", "__"): tensor for name, tensor in flat.items()}


class RankModule(nn.Module):
    """The rank program for one local rank, its weights and caches as parameters, as NxD wants them."""

    def __init__(self, config: OPTConfig, neuron_config: OPTNeuronConfig, weights: dict[str, Tensor]):
        super().__init__()
        reduce = mappings.reduce_from_tensor_model_parallel_region
        gather = mappings.gather_from_tensor_model_parallel_region
        group = RankGroup(TP, (0,), Products(neuron_config.amp_dtype), all_reduce=reduce, all_gather=gather)
        self.program, self.max_topk = OPTRankProgram(config, group), neuron_config.max_topk
        empty = torch.zeros(cache_shape(config, neuron_config), dtype=neuron_config.cache_dtype)
        self.weights = list(weights)
        self.states = [f"{kind}_{index}" for index in range(config.num_hidden_layers) for kind in ("keys", "values")]
        for name, tensor in (weights | dict.fromkeys(self.states, empty)).items():
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))

    def part(self, prefix: str) -> Weights:
        """The weights of a part, as the rank program takes them; looked up anew, since tracing swaps them."""
        names = [name for name in self.weights if name.startswith(f"{prefix}__")]
        return {name.removeprefix(f"{prefix}__").replace("__", "."): [self.get_parameter(name)] for name in names}

    def forward(self, tokens: Tensor, lengths: Tensor, window: Tensor, *selection: Tensor) -> tuple[Tensor, ...]:
        """Next tokens int32 `(b,)`, logits float32 `(b, vocabulary)`, and the new states.

        `tokens` are int32, prompts `(b, n)` for `context_encoding`, each row's last token `(b,)` otherwise; `lengths`,
        int32 `(b,)`, says how many tokens each row has, those included. The length of `window` is the cache bucket; it
        has no other use: the older builder finds the graph for a call by the shapes of its arguments alone.
        """
        prompt = tokens.dim() == 2
        if prompt:
            positions = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device).expand_as(tokens)
        else:
            tokens, positions = tokens[:, None], lengths[:, None] - 1
        # States are results of the graph, not parameters changed by it: the program writes to copies.
        states = [self.get_parameter(name).clone() for name in self.states]
        hidden = self.program.embed(self.part("embed"), tokens, positions)
        for index, (keys, values) in enumerate(zip(states[::2], states[1::2], strict=True)):
            cache = LayerCache([keys], [values]).first(window.shape[0])
            hidden = self.program.layer(self.part(f"layer_{index}"), hidden, *cache, positions, prompt)
        hidden = last_token(hidden, lengths) if prompt else hidden[:, 0]
        tied = {"lm_head.weight": self.part("embed")["embed_tokens.weight"]}
        logits = self.program.logits(tied | self.part("head"), hidden)
        return select_tokens(logits, *selection, self.max_topk), logits, *states


class Instance(BaseModelInstance):
    """Tells the older builder which results are which states; making the module it leaves to its base class."""

    def get(self, bucket_rank: int, **kwargs) -> tuple[nn.Module, dict[Tensor, int]]:
        # Tokens and logits come before the states.
        return self.module, {self.module.get_parameter(name): 2 + i for i, name in enumerate(self.module.states)}


def check(changes: dict, amp: str, workdir: Path) -> tuple[float, int, Counter[str]]:
    """Traces and runs one model; (largest error in σ, wrong tokens, opcodes of the longest token_generation)."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    config = OPTConfig(**{**sizes, "num_hidden_layers": 2, "max_position_embeddings": SEQUENCE, **changes})
    torch.manual_seed(0)
    with no_init_weights():
        model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "layer_norm.weight" in name else 0.0, 0.1)
    neuron_config = OPTNeuronConfig(batch_size=BATCH, sequence_length=SEQUENCE, tp_degree=TP, amp=amp)
    save_pretrained_split(model, workdir / "checkpoint", amp)
    reference = OPTForCausalLM.from_pretrained(workdir / "checkpoint", dtype=torch.float32)
    groups = [RankGroup(TP, ranks=(rank,)) for rank in range(TP)]
    ranks = [named(load_weights(workdir / "checkpoint", config, neuron_config, group)) for group in groups]
    # Greedy: top_k, top_p and temperature are 1.
    greedy = (torch.ones(BATCH, 3), torch.zeros(BATCH), torch.full((BATCH, MAX_SUPPRESSED), -1, dtype=torch.int32))
    lengths = torch.tensor(PROMPTS, dtype=torch.int32)
    # Random behind the prompts' ends too: what is there must not matter.
    ids = torch.randint(4, config.vocab_size, (BATCH, SEQUENCE), dtype=torch.int32)
    windows = {size: torch.zeros(size, dtype=torch.int32) for size in PROMPT_BUCKETS + CACHE_BUCKETS}
    prefills = [(ids[:, :size], lengths, windows[size], *greedy) for size in PROMPT_BUCKETS]
    decodes = [(ids[:, 0], lengths, windows[size], *greedy) for size in CACHE_BUCKETS]
    builder = ModelBuilder(router=None, tp_degree=TP, checkpoint_loader=None, compiler_workdir=f"{workdir}/work/")
    for key, examples in (("context_encoding", prefills), ("token_generation", decodes)):
        instance = Instance(lambda: RankModule(config, neuron_config, ranks[0]).eval(), input_output_aliases={})
        builder.add(key=key, model_instance=instance, example_inputs=examples)
    traced = builder.trace(initialize_model_weights=False)
    traced.nxd_model.initialize(ranks, torch.tensor([0], dtype=torch.int32))

    rows = [ids[row, :length].tolist() for row, length in enumerate(PROMPTS)]
    errors, wrong = [], []

    def compare(tokens: Tensor, logits: Tensor) -> None:
        for row, token in enumerate(tokens.tolist()):
            with torch.no_grad():
                wanted = reference(torch.tensor([rows[row]])).logits[0, -1]
            errors.append((logits[row] - wanted).abs().max() / wanted.std())
            # Another token than the reference's best passes only where both are as good, to the tolerance.
            wrong.append(bool(wanted.max() - wanted[token] > 2 * TOLERANCE[amp] * wanted.std()))

    # The longest bucket first: what it leaves in the cache behind the prompts must not matter either.
    for prefill in reversed(prefills):
        tokens, logits = traced(*prefill)
        compare(tokens, logits)
    for _ in range(STEPS):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
        window = windows[smallest_bucket(CACHE_BUCKETS, int(lengths.max()))]
        tokens, logits = traced(tokens, lengths, window, *greedy)
        compare(tokens, logits)
    parts = builder.model_collection["token_generation"].hlo_artifact_collection[-1].hlo_module.computations
    return torch.stack(errors).max().item(), sum(wrong), Counter(i.opcode for c in parts for i in c.instructions)


def main() -> int:
    failed = False
    print(f"{'kind':26} {'amp':5} {'error, σ':>9} {'allowed':>8} {'wrong tokens':>13} {'all-reduces a layer':>20}")
    for kind, changes in KINDS.items():
        for amp, allowed in TOLERANCE.items():
            with tempfile.TemporaryDirectory() as workdir:
                worst, wrong, opcodes = check(changes, amp, Path(workdir))
            # One more adds the parts of the vocabulary in the embedding.
            reduces = (opcodes["all-reduce"] - 1) / 2
            print(f"{kind:26} {amp:5} {worst:9.1e} {allowed:8.0e} {wrong:13} {reduces:20g}", flush=True)
            failed |= not worst <= allowed or wrong > 0 or reduces != 2
    print("opcodes of token_generation:", ", ".join(f"{opcode} {count}" for opcode, count in sorted(opcodes.items())))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
