"""Cells for the tests that compare a model's scores with its plain forward."""

from __future__ import annotations

import pytest

from tests.families import cells


@pytest.fixture(scope="module")
def cache():
    return cells()
