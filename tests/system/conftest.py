"""`make test-system` runs these; they are outside pytest's default paths, for they need nginx and Prometheus.

--smoke shortens them for CI, and leaves out what takes minutes. --pictures writes the docs' pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.support import Nginx, Replica


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="seconds instead of minutes, the long tests left out"
    )
    parser.addoption(
        "--pictures", metavar="FOLDER", help="draw the dashboards from Prometheus' answers into it"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "minutes: left out by --smoke")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke"):
        left_out = [item for item in items if item.get_closest_marker("minutes")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def seconds(request: pytest.FixtureRequest) -> float:
    """How long load runs."""
    return 10.0 if request.config.getoption("--smoke") else 60.0


@pytest.fixture(scope="session")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    """Two, each with 4 slots; the tests put back what they stop."""
    folder = tmp_path_factory.mktemp("replicas")
    options = ("--max-num-seqs", "4", "--max-model-len", "2048", "--kv-cache-tokens", "8192")
    with Replica("replica-1", folder, *options) as first, Replica("replica-2", folder, *options) as second:
        first.wait_ready()
        second.wait_ready()
        yield first, second


@pytest.fixture
def nginx(tmp_path: Path, replicas: tuple[Replica, Replica]) -> Iterator[Nginx]:
    with Nginx(tmp_path, replicas) as balancer:
        yield balancer
