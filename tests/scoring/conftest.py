"""Cells and a table of errors, for the tests that compare a model's scores with its plain forward."""

from __future__ import annotations

import pytest

from tests.families import cells, print_table


@pytest.fixture(scope="module")
def cache():
    return cells()


@pytest.fixture(scope="module")
def table():
    """Rows of (name, what, number), printed when the module is done."""
    rows: list[tuple[str, str, float]] = []
    yield rows
    print_table("largest difference from the plain forward, nats per token", rows)
