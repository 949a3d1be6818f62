"""A served data folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.served import Served


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("data"))
    yield served
    served.close()


@pytest.fixture
def url(served: Served) -> Iterator[str]:
    with served.listening() as url:
        yield url
