"""Marks for tests that need what is not installed everywhere."""

import huggingface_hub
import pytest

from optimum_opt_trn.host_framework import INSTALLED


needs_optimum_neuron = pytest.mark.skipif(
    not INSTALLED, reason="needs optimum-neuron, which is for Python 3.10 and 3.11 and transformers 4.57"
)

needs_lfs_uploads = pytest.mark.skipif(
    huggingface_hub.__version__[0] > "1",
    reason="huggingface_hub 2 uploads by Xet only, which the hub of these tests does not speak",
)
