"""The command line `sapo`: one module a subcommand."""
