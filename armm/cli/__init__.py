"""The `armm` command: one file per group of sub-commands; heavy imports happen inside the handlers."""
