"""The subcommands of `ether-diffusion`: each a module with `add_arguments(parser)` and `run(args)`.

`run` returns nothing; what the user got wrong is a ValueError or OSError whose message says what to do.
"""
