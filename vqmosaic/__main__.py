"""Runs the vqmosaic command: `python -m vqmosaic`."""

from pipelines.command_line import main

if __name__ == "__main__":
    main()
