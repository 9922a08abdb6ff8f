"""The tables in docs/generation.md are what the script makes, and leave no option out."""

import pytest
from generation_table import ASKED, MADE, VERSION, VERSIONS, committed, options

from optimum_opt_trn.generation.refusals import REFUSED_OPTIONS


def test_no_option_is_left_out():
    assert {*options()} <= {*ASKED}
    assert {*REFUSED_OPTIONS} <= {*ASKED}


@pytest.mark.skipif(VERSION not in VERSIONS, reason=f"the page has no column for transformers {VERSION}")
@pytest.mark.parametrize("name", MADE)
def test_the_page_says_what_running_every_option_gives(name):
    assert committed(name) == MADE[name](), "run: python tests/support/generation_table.py --write"
