"""The subcommands of `octavo`: one module or one folder each. `octavo/cli.py` lists them."""
