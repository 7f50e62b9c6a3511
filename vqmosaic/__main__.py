"""Runs the vqmosaic command: `python -m vqmosaic`, and the console script."""

import os
import signal
import sys


def main() -> None:
    """Run the command. Ctrl-C while it is loaded ends it with one line, like Ctrl-C later."""
    try:
        from pipelines.command_line import main as run_command
    except KeyboardInterrupt:
        print("stopped by SIGINT; nothing was started. Run the same command again.", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # not sys.exit, which would run the clean-up of half loaded libraries
    run_command()


if __name__ == "__main__":
    main()
