from collections.abc import Callable, Iterator

import pytest
from helpers.table_models import TableModel

from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.engine import Engine


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(target: TableModel, drafter: TableModel | None = None, **limits: int) -> Engine:
        engines.append(Engine(target, drafter or target, limits=EngineLimits(**limits)))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
