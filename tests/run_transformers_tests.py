#!/usr/bin/env python
"""Runs transformers' own generation tests of OPT with `NeuronOPTForCausalLM` in place of its class.

    git clone --depth 1 --branch v4.57.6 https://github.com/huggingface/transformers /tmp/transformers
    pip install parameterized timeout-decorator
    python tests/run_transformers_tests.py /tmp/transformers [pytest's options]

transformers' tests are no part of its package. Each model that they make is exported to a temporary directory, in
float32, and loaded from it. docs/tested.md says which tests fail, and why.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
from transformers import OPTConfig, OPTForCausalLM

from optimum_opt_trn import NeuronOPTForCausalLM


# As many rows as a test asks for at most.
BATCH_SIZE = 13

# Tests of the OPT's test class that generate, besides those of `GenerationTesterMixin`.
ALSO = {"test_generate_fp16", "test_inputs_embeds"}


class Exported(NeuronOPTForCausalLM):
    """`Exported(config)` is an export of a random OPT, as `OPTForCausalLM(config)` is a random OPT."""

    # What transformers' tests ask of a class: they leave out what it does not have.
    _can_compile_fullgraph = _supports_sdpa = _supports_flash_attn = _supports_attention_backend = False

    def __new__(cls, config: OPTConfig) -> NeuronOPTForCausalLM:
        with tempfile.TemporaryDirectory() as directory:
            OPTForCausalLM(config).save_pretrained(directory)
            return NeuronOPTForCausalLM.from_pretrained(
                directory,
                amp="f32",
                batch_size=BATCH_SIZE,
                sequence_length=config.max_position_embeddings,
            )

    @classmethod
    def _from_config(cls, config: OPTConfig, **_: object) -> NeuronOPTForCausalLM:
        return cls(config)


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests/models/opt/test_modeling_opt.py").is_file():
        sys.exit(f"{__doc__}\nGive the directory of a checkout of transformers.")
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    # Tests of pipelines are not run, and their imports need many packages.
    pipelines = ModuleType("tests.test_pipeline_mixin")
    pipelines.PipelineTesterMixin = type("PipelineTesterMixin", (), {})  # type: ignore[attr-defined]
    sys.modules[pipelines.__name__] = pipelines

    from tests.generation.test_utils import GenerationTesterMixin

    generation = {name for name in vars(GenerationTesterMixin) if name.startswith("test_")}

    class WithOurs:
        @staticmethod
        def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
            items[:] = [item for item in items if item.originalname in {*generation, *ALSO}]
            for item in items:
                item.cls.all_model_classes = (Exported,)

    file = checkout / "tests/models/opt/test_modeling_opt.py"
    options = ["-p", "no:cacheprovider", "--rootdir", str(checkout), "-c", "/dev/null", "-W", "ignore", *sys.argv[2:]]
    return pytest.main([*options, f"{file}::OPTModelTest"], plugins=[WithOurs()])


if __name__ == "__main__":
    sys.exit(main())
