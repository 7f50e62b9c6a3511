"""`python -m vqmosaic` is the vqmosaic command."""

from pipelines.command_line import main

if __name__ == "__main__":
    main()
