"""Each fault once or a few times; table.py tries them more often and writes docs/reliability.md."""

from random import Random

import pytest
from faults import FAULTS, Ground, Skipped, attempt


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost(name, ground):
    random = Random(name)
    for _ in range(2):
        try:
            assert attempt(FAULTS[name], ground, random)
        except Skipped as reason:
            pytest.skip(str(reason))
