"""One Slurm for all tests of the launch scripts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running Slurm with a node of 8 pretended GPUs; skipped where none can be started."""
    reason = why_not()
    if reason is not None:
        if os.environ.get("LGPT_REQUIRE_SLURM") == "1":
            pytest.fail(f"LGPT_REQUIRE_SLURM=1, but no Slurm can be started here: {reason}")
        pytest.skip(f"no Slurm can be started here: {reason}")
    with SlurmCluster() as cluster:
        yield cluster
