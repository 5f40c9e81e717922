from __future__ import annotations

from typing import Any

import pytest

import foveate as fv


@pytest.fixture(params=[{"levels": 32}, {"levels": 4}, {"error": 0.1}])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**request.param, "options": fv.ActivationOptions(smallest=1)}
