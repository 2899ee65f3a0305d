from __future__ import annotations

import pytest

from rsplugins.errors import UsageError
from rsplugins.machine.ranks import Ranks


def test_without_a_launcher_a_process_is_alone():
    ranks = Ranks.from_environment({})
    assert (ranks, ranks.shard, ranks.agree("x")) == (Ranks(0, 1), None, ["x"])
    ranks.leave()


def test_a_rank_takes_its_share():
    assert Ranks.from_environment({"RANK": "2", "WORLD_SIZE": "3"}).shard == (2, 3)


@pytest.mark.parametrize("environment", [{"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "x"}, {"RANK": "1"}])
def test_a_contradiction_is_refused(environment):
    with pytest.raises(UsageError):
        Ranks.from_environment(environment)
