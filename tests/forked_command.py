"""Runs vqmosaic commands in forks of a process that has imported the command but none of the slow libraries.

    with ForkedCommands() as commands:
        result = commands.run("generate", "/nowhere")

Each command sees what a new process sees, including which modules are loaded, without the time to start Python and import the command. The server
runs in a process of its own, because the test process has loaded torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """What a command returned and printed, and the names of all modules that were loaded when it ended."""

    returncode: int
    stdout: str
    stderr: str
    modules: set[str]


class ForkedCommands:
    """A server process that forks for each command."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen([sys.executable, "-m", "tests.forked_command"], cwd=ROOT, env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, *arguments: object) -> Result:
        """Run the command in a new fork, from the project root."""
        with tempfile.TemporaryDirectory() as folder:
            self.server.stdin.write(json.dumps([folder, list(map(str, arguments))]) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            stdout, stderr, modules = ((Path(folder) / name).read_text() for name in ("stdout", "stderr", "modules"))
        return Result(code, stdout, stderr, set(modules.split()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(10)
        self.server.stdout.close()


def run_in_fork(folder: str, arguments: list[str]) -> None:
    """Run one command with its output in files of the folder. Does not return."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        target = os.open(os.path.join(folder, name) if number else os.devnull, os.O_RDWR | os.O_CREAT)
        os.dup2(target, number)
    code = 1
    try:
        sys.argv = ["vqmosaic", *arguments]
        from pipelines.command_line import main

        main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with open(os.path.join(folder, "modules"), "w") as file:
            file.write("\n".join(sys.modules))
        os._exit(code)


def serve() -> None:
    """Fork for each line of stdin, and write the exit code of the fork."""
    import pipelines.command_line  # noqa: F401, the forks need not import it again

    for line in sys.stdin:
        folder, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            run_in_fork(folder, arguments)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
