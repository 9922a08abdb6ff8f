"""`optimum-cli neuron split`: converts weights in any format to a split checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .common import (
    ADAPTER,
    AUTO_CAST_TYPE,
    CACHE_DIR,
    REVISION,
    WEIGHT_DTYPE,
    describe,
    explain_errors,
    one_line_errors,
)


DESCRIPTION = """\
Split an OPT checkpoint: cast it and write one safetensors file per decoder layer, a few megabytes in memory at a
time, so that a host with little memory can split (and load) a model of any size. The result is an ordinary Hugging
Face checkpoint that does not depend on the target: OPTForCausalLM.from_pretrained loads it, and
`optimum-cli export neuron` takes it at any tensor-parallel degree, without copying it if the dtype is the same."""

EPILOG = """\
examples:
  optimum-cli neuron split -m facebook/opt-13b opt-13b-split
  optimum-cli neuron split -m ./my-opt --auto_cast_type bf16 my-opt-split
  optimum-cli neuron split -m facebook/opt-66b --delete_source_shards opt-66b-split   # for a small disk

SOURCE may hold:
  model.safetensors, or its shards with an index
  pytorch_model.bin, or its shards with an index
  pytorch_model.bin/    a split checkpoint of transformers-neuronx, one file per tensor

OUTPUT will hold:
  config.json, generation_config.json, tokenizer files   as in the source
  embeddings_and_head.safetensors, layer_000.safetensors, ...   the weights, and their index
  split_manifest.json   size and SHA-256 of each file

If it is interrupted, run the same command again: it continues where it stopped. Next:
  optimum-cli neuron verify opt-13b-split
  optimum-cli export neuron -m opt-13b-split --tensor_parallel_size 2 opt-13b-cpu"""


class SplitCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="split", help="Write an OPT checkpoint as one file per layer, with little memory.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        describe(parser, DESCRIPTION, EPILOG)
        required = parser.add_argument_group("required")
        required.add_argument(
            "-m", "--model", metavar="SOURCE", required=True, help="Model id on the Hub, or a local directory."
        )
        required.add_argument(
            "output",
            metavar="OUTPUT",
            type=Path,
            help="Directory to write: new, or left by an earlier split.",
        )
        group = parser.add_argument_group("options")
        group.add_argument("--auto_cast_type", default="fp16", **AUTO_CAST_TYPE)
        group.add_argument("--weight_dtype", **WEIGHT_DTYPE)
        group.add_argument("--adapter", **ADAPTER)
        group.add_argument(
            "--delete_source_shards",
            action="store_true",
            help="Keep no copy of a Hub model's weights: fetch one file after the other to OUTPUT, and delete it when "
            "it is split. Files that are in the cache already stay there.",
        )
        group.add_argument("--revision", **REVISION)
        group.add_argument("--cache_dir", **CACHE_DIR)
        explain_errors(parser)

    def run(self) -> None:
        output = self.args.output
        with one_line_errors("optimum-cli neuron split", f"run the same command again to continue with {output}."):
            from ..checkpoint import save_pretrained_split

            save_pretrained_split(
                self.args.model,
                output,
                amp=self.args.auto_cast_type,
                weight_dtype=self.args.weight_dtype,
                adapter=self.args.adapter,
                delete_source_shards=self.args.delete_source_shards,
                revision=self.args.revision,
                cache_dir=self.args.cache_dir,
            )
            files = list(output.glob("*.safetensors"))
            size = sum(file.stat().st_size for file in files)
            dtype = self.args.weight_dtype or self.args.auto_cast_type
            print(f"Split to {output}: {len(files)} files, {size / 1e9:.2f} GB, weights in {dtype}.")
