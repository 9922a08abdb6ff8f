"""The HLO opcodes that the rank program's graphs may have, each with the reason to believe that neuronx-cc takes it.

A change of the program that brings in another shows in check_with_nxdsim.py, and is to be weighed: is it in graphs
that run on hardware, or documented?
"""

from __future__ import annotations


_DECODER = "optimum-neuron 0.4.5's Llama (context_encoding, token_generation, speculation), traced in nxdsim"
_SHARDED = f"{_DECODER}, on two ranks"
_SAMPLER = "optimum-neuron 0.4.5's sampler (NxD's operators/topk.py), traced in nxdsim on two ranks"
_DOCUMENTED = "listed for XLA in awsdocs-neuron, release-notes/archive/neuron-cc/neuron-cc-ops/neuron-cc-ops-xla.html"
_GELU = "the exact GELU, of the BERT that optimum-neuron 0.4.5 exports (models/inference/bert); here Galactica's alone"

_BY_SOURCE = {
    _DECODER: (
        *("add", "broadcast", "compare", "concatenate", "constant", "convert", "divide", "dot", "exponential"),
        *("gather", "get-tuple-element", "iota", "maximum", "minimum", "multiply", "parameter", "reduce", "reshape"),
        *("rsqrt", "scatter", "select", "slice", "subtract", "transpose", "tuple"),
    ),
    _SHARDED: ("all-gather", "all-reduce"),
    _SAMPLER: ("sort",),
    _DOCUMENTED: ("and", "clamp", "pad"),
    _GELU: ("erf",),
}

ALLOWED = {opcode: source for source, opcodes in _BY_SOURCE.items() for opcode in opcodes}
