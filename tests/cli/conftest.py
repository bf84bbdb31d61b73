"""Fixtures of the command line's tests; other folders take them from `cli_helpers` by name."""

from tests.cli.cli_helpers import files, model, sapo, tiny  # noqa: F401
