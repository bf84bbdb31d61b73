"""The generators of the bundled tasks; `python -m tools.bundled_tasks.make_tasks` writes them."""
