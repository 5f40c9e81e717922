from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(params=[{"levels": 32}, {"levels": 4}, {"error": 0.1}])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**request.param, "smallest": 1}
