"""The HLO opcodes that the rank program's graphs may have, each with the reason to believe that neuronx-cc takes it.

A change of the program that brings in another shows in check_with_nxdsim.py, and is to be weighed: is it in graphs
that run on hardware, or documented?
"""

from __future__ import annotations


_DECODER = "optimum-neuron 0.4.5's Llama (context_encoding, token_generation, speculation), traced in nxdsim"
_SHARDED = f"{_DECODER}, on two ranks"
_CACHE = "optimum-neuron 0.4.5's cache (models/inference/backend/modules/kvcache/utils.py), built for neuronx-cc"
_OLDER = "transformers-neuronx 0.13, built for neuronx-cc (hlo.py: masks, quantisation, logical_not, sort)"
_GELU = "the exact GELU, of the BERT that optimum-neuron 0.4.5 exports (models/inference/bert); here Galactica's alone"

_BY_SOURCE = {
    _DECODER: (
        *("add", "broadcast", "compare", "concatenate", "constant", "convert", "divide", "dot", "exponential"),
        *("gather", "get-tuple-element", "iota", "maximum", "minimum", "multiply", "parameter", "reduce", "reshape"),
        *("rsqrt", "scatter", "select", "slice", "subtract", "transpose", "tuple"),
    ),
    _SHARDED: ("all-gather", "all-reduce"),
    _CACHE: ("dynamic-update-slice",),
    # The sort is the simulator's: the package calls the SDK's TopK, as optimum-neuron's sampler does by way of NxD's
    # operators/topk.py, and the simulator has torch.topk in its place.
    _OLDER: ("and", "clamp", "not", "sort"),
    _GELU: ("erf",),
}

ALLOWED = {opcode: source for source, opcodes in _BY_SOURCE.items() for opcode in opcodes}
