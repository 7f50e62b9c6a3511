"""`python -m vqmosaic` is the vqmosaic command."""

import importlib

if __name__ == "__main__":
    importlib.import_module("pipelines.command_line").main()  # by name, since this package imports nothing of the others
