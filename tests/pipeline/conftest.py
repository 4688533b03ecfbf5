"""What several tests of runs compare with."""

import pytest


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The demo model by one process."""
    from tests.pipeline.test_same_bytes import PLAIN, run

    return run(tmp_path_factory.mktemp("demo"), 1, PLAIN)
