"""Starts a stage in one or more processes. Does not import torch, which the module of the stage imports.

A single process is this process. Several processes, the workers, run under Accelerate's launcher in a session of their own. The launcher loses
signals, exit codes and error messages. So this process forwards signals to the workers directly, and the workers write their process IDs, exit codes
and messages to files in a folder. Workers are killed when their parent ends.
"""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from vqmosaic.errors import InputError, did_you_mean
from vqmosaic.files.full_disks import DiskFull, explain_any_full_disk, explain_full_disk
from vqmosaic.files.given_paths import check_path, explain_impossible_paths
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.runs.interruption import EXIT_CODES, GRACE_SECONDS, Interrupted, die_with_parent, handled_signals
from vqmosaic.runs.out_of_memory import is_out_of_memory
from vqmosaic.runs.process_settings import set_up_process

PROCESSES_VARIABLE = "VQMOSAIC_PROCESSES"
WORKER_FOLDER_VARIABLE = "VQMOSAIC_WORKER_FOLDER"
LAUNCHER_FILE = "launcher"
"""The file in the worker folder with the launcher's process ID. The workers write RANK.pid, RANK.exit (exit code) and RANK.words (message)."""
LAUNCHER_EXIT_SECONDS = 20.0
"""Seconds that the launcher may take to exit after its workers have ended."""
KILL_SECONDS = GRACE_SECONDS + 1.0
"""Seconds from a second signal until workers that are still running are killed."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE",
                   "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE",
                   "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Environment variables in which launchers pass the rank of a process. If they are set, torch and Accelerate wait for the other ranks."""
SHIPPED_ACCELERATE_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


def run_stage(module: str, arguments: list[str], processes: int | None = None, accelerate_config: str | None = None) -> int:
    """Run the `main(arguments)` of a stage's module in this process, or in several workers under Accelerate's launcher. Returns the exit code.

    `processes` is the total over all machines. None uses the number in the accelerate configuration, or 1 without a configuration.
    """
    processes = processes_to_start(processes, accelerate_config)
    drop_inherited_ranks()
    if processes == 1 and accelerate_config is None:
        return exit_code_of(lambda: importlib.import_module(module).main(arguments))
    command = [sys.executable, "-c", "from vqmosaic.runs.launch import launch_quietly; launch_quietly()"]
    environment, machines = dict(os.environ), 1
    if accelerate_config is not None:
        path = find_accelerate_config(accelerate_config)
        command += ["--config_file", str(path), "--num_processes", str(processes)]
        machines = read_accelerate_config(path).machines
    else:  # without --multi_gpu the launcher silently starts one process on a CPU machine; port 0 is any free port
        command += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
                    "--dynamo_backend", "no", "--main_process_port", "0"]
    environment[PROCESSES_VARIABLE] = str(processes)
    protect_imports(environment)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) * machines // processes)))
    with explain_full_disk(Path(tempfile.gettempdir())):
        temporary = tempfile.TemporaryDirectory(prefix="vqmosaic-workers-")
    with temporary as folder:
        environment[WORKER_FOLDER_VARIABLE] = folder
        return run_workers([*command, "-m", module, *arguments], environment, Path(folder), processes // machines)


def drop_inherited_ranks() -> None:
    """Remove the rank variables of another launcher from the environment and print a note: this command starts its own processes."""
    inherited = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    if inherited:
        variables = ", ".join(f"{name}={value}" for name, value in inherited.items())
        print(f"note: ignoring {variables} in the environment: `vqmosaic` starts its own processes (--processes). To use another launcher, start "
              "the stage's module, for example `accelerate launch -m stage2_prior.train RECIPE`.", file=sys.stderr)


def protect_imports(environment: dict[str, str]) -> None:
    """Prevent modules in the working directory, such as a user's own pipelines/ or accelerate.py, from shadowing the real ones."""
    environment["PYTHONSAFEPATH"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    if os.path.samefile(root, os.getcwd()):  # a checkout that is not installed is only importable from the working directory
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))


def find_accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration, given its path or the name of a shipped one. Otherwise raises InputError, which lists the names."""
    check_path("--accelerate_config", name)
    if Path(name).is_file():
        return Path(name)
    shipped = SHIPPED_ACCELERATE_CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in SHIPPED_ACCELERATE_CONFIGS.glob("*.yaml"))
    raise InputError(f"--accelerate_config is {name!r}, which is neither a file nor one of the shipped configurations: {', '.join(names)}. "
                     f"`accelerate config` writes a file.{did_you_mean(name, names)}")


class AccelerateConfig(NamedTuple):
    """The fields of an accelerate configuration that are needed to start the launcher."""

    processes: int | None
    """Total over all machines; None if the configuration does not set it."""
    machines: int


def processes_to_start(processes: int | None, accelerate_config: str | None) -> int:
    """The number of processes over all machines: `processes`, else the number in the accelerate configuration, else 1.

    Raises InputError if the configuration is invalid or sets no number, or if the number is not divisible by its number of machines.
    """
    if accelerate_config is None:
        return 1 if processes is None else processes
    path = find_accelerate_config(accelerate_config)
    config = read_accelerate_config(path)
    name, count = ("num_processes", config.processes) if processes is None else ("--processes", processes)
    if count is None:
        raise InputError(f"--accelerate_config {path} does not set num_processes; add it, or give --processes.")
    if count % config.machines:
        below = count // config.machines * config.machines
        raise InputError(f"{name} is {count}, but {path} is for {config.machines} machines. Use a multiple of {config.machines}; the nearest: "
                         f"{f'{below}, ' if below else ''}{below + config.machines}.")
    return count


def read_accelerate_config(path: Path) -> AccelerateConfig:
    """The numbers of processes and machines in an accelerate configuration. Raises InputError if the file is invalid."""
    try:
        content = yaml.safe_load(path.read_text())
        processes = content.get("num_processes", 1 if content["distributed_type"] == "NO" else None)
        config = AccelerateConfig(None if processes is None else int(processes), int(content.get("num_machines", 1)))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--accelerate_config {path} is not an accelerate configuration: {' '.join(str(error).split())}. "
                         "`accelerate config` writes one.") from error
    for name, number in (("num_processes", config.processes), ("num_machines", config.machines)):
        if number is not None and number < 1:
            raise InputError(f"--accelerate_config {path} sets {name} to {number}; it must be at least 1.")
    return config


def launch_quietly() -> None:
    """Run Accelerate's launcher without its traceback for a worker that failed or was stopped: the worker itself has reported the reason."""
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except (ChildFailedError, SignalException):
        sys.exit(1)


def run_workers(command: list[str], environment: dict[str, str], folder: Path, count: int) -> int:
    """Run the launcher of `count` workers, forward signals to the workers that have registered in `folder`, and return their exit code."""
    parent = os.getpid()
    launcher: subprocess.Popen | None = None
    received_signals: list[int] = []
    pending_signals: list[int] = []  # those that are not forwarded yet

    def forward_signals() -> None:
        while launcher is not None and pending_signals:
            number = pending_signals.pop(0)
            workers = worker_pids(folder)
            for process in workers or [launcher.pid]:
                try:
                    os.kill(process, number if workers else signal.SIGTERM)  # SIGINT would make a launcher that still imports print a traceback
                except ProcessLookupError:
                    continue

    def on_signal(number, _frame):
        received_signals.append(number)
        pending_signals.append(number)
        forward_signals()

    previous_handlers = {number: signal.signal(number, on_signal) for number in handled_signals()}
    try:
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with_parent(parent))
        write_note(folder / LAUNCHER_FILE, str(launcher.pid))
        forward_signals()  # signals that came before the launcher started
        wait_for_launcher(launcher, folder, count, received_signals)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return report_workers(folder, count, launcher.returncode, received_signals)


def report_workers(folder: Path, count: int, launcher_code: int, received_signals: list[int]) -> int:
    """Choose one exit code for all workers after their launcher has ended, and print the message of a worker that exited with it.

    Args:
        folder: worker folder, with the exit codes and messages of the workers.
        launcher_code: exit code of the launcher. The exit codes of the workers take precedence.
        received_signals: the signals that this process received.
    """
    if all_succeeded(folder, count):  # whatever the launcher's code, because wait_for_launcher may have killed it
        return 0
    codes = exit_codes(folder)
    failures = [code for code in codes if code]
    # Codes with which a stage itself stops. Other workers may have failed only because the launcher ended them.
    for own_code in (2, *(EXIT_CODES[number] for number in received_signals)):
        if own_code in failures:
            print_message(folder, own_code)
            return own_code
    if len(codes) == count and all(code in EXIT_CODES.values() for code in codes):  # a signal on another machine
        print_message(folder, codes[0])
        return codes[0]
    if launcher_code and received_signals:  # stopped before any worker could have saved
        return EXIT_CODES[received_signals[0]]
    # No signal came to this process. The launcher has ended the workers with a signal's exit code, because another worker failed.
    failures = [code for code in failures if code not in EXIT_CODES.values()]
    if failures:
        print_message(folder, failures[0])  # workers that failed with a traceback have printed it, and have no message
        return failures[0]
    if not launcher_code:
        return 0
    if any(folder.glob("*.pid")):
        print("error: a worker process was killed (often: out of memory).", file=sys.stderr)
    else:
        print("error: the worker processes did not start; see the output above.", file=sys.stderr)
    return 1


def wait_for_launcher(launcher: subprocess.Popen, folder: Path, count: int, received_signals: list[int]) -> None:
    """Wait until the launcher has ended, or kill it LAUNCHER_EXIT_SECONDS after all `count` workers have reported their exit codes.

    The launcher needs this limit because the launchers of several machines wait for each other, for five minutes if one has already ended. After a
    second signal (`received_signals` grows as signals come), workers and launcher are killed within KILL_SECONDS.
    """
    deadline = kill_at = None
    while True:
        if kill_at is None and len(received_signals) > 1:
            kill_at = time.monotonic() + KILL_SECONDS
        if kill_at is not None and time.monotonic() > kill_at:
            for process in [*worker_pids(folder), launcher.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        try:
            launcher.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            if deadline is None and len(exit_codes(folder)) == count:
                deadline = time.monotonic() + LAUNCHER_EXIT_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                launcher.kill()


def worker_pids(folder: Path) -> list[int]:
    """The process IDs of the workers that have registered. A file is empty while its worker writes it."""
    return [int(text) for path in folder.glob("*.pid") if (text := path.read_text())]


def exit_codes(folder: Path) -> list[int]:
    """The exit codes of the workers that have reported one. A file is empty while its worker writes it."""
    return [int(text) for path in sorted(folder.glob("*.exit")) if (text := path.read_text())]


def all_succeeded(folder: Path, count: int) -> bool:
    """Whether all `count` workers have exited with 0."""
    codes = exit_codes(folder)
    return len(codes) == count and not any(codes)


def print_message(folder: Path, code: int) -> None:
    """Print the message of the first worker that exited with this code. Others have the same message, or stopped because of this worker."""
    for path in sorted(folder.glob("*.exit")):
        message_file = path.with_suffix(".words")
        if int(path.read_text()) == code and message_file.exists():
            print(message_file.read_text(), file=sys.stderr)
            return


def run_worker(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Entry point of `python -m <stage>`: run `main(arguments)` as a worker of a launcher or alone, and exit with its exit code."""
    set_up_process()
    folder = os.environ.get(WORKER_FOLDER_VARIABLE) and Path(os.environ[WORKER_FOLDER_VARIABLE])
    rank = int(os.environ.get("RANK", "0"))
    if folder:
        die_with_parent(int((folder / LAUNCHER_FILE).read_text()))

    def work() -> None:
        if folder:
            write_note(folder / f"{rank}.pid", str(os.getpid()))
        if not arguments:
            raise InputError("no recipe was given; give a shipped name such as digits, a YAML file or a run folder, followed by overrides.")
        main(arguments)

    code = exit_code_of(work, folder / f"{rank}.words" if folder else None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader has closed it
            stream.flush()
    if folder:
        with contextlib.suppress(DiskFull):  # the exit code of the launcher tells the parent that something failed
            write_note(folder / f"{rank}.exit", str(code))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # not sys.exit: its clean-up can wait forever for a torch thread that holds a tensor
        os._exit(code)
    exit_process(code)


def write_note(path: Path, text: str) -> None:
    """Write one of the files through which workers and parent communicate. Raises DiskFull, which names the folder, if it does not fit."""
    with explain_full_disk(path.parent):
        path.write_text(text)


def exit_process(code: int) -> None:
    """Exit with this code. After a signal, skip Python's clean-up: it would wait for threads that are stuck reading a file."""
    if code in EXIT_CODES.values():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


def exit_code_of(run: Callable[[], None], message_file: Path | None = None) -> int:
    """Call `run` and return the exit code: 0, 2 with a message for bad input, one of EXIT_CODES after a signal, 1 with a traceback for other errors.

    The message goes to stderr, or to `message_file` for a parent that prints it once for all of its workers.
    """
    def report(text: str) -> None:
        if message_file is not None:
            with contextlib.suppress(DiskFull):
                write_note(message_file, text)
                return
        print(text, file=sys.stderr)

    try:
        with explain_permission_errors(), explain_any_full_disk(), explain_impossible_paths():
            run()
        return 0
    except InputError as error:
        report(f"error: {error}")
        return 2
    except Interrupted as stop:
        report(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:  # where nothing handles the signal, such as while libraries are loaded
        report(str(Interrupted(signal.SIGINT, "what was finished before is kept")))
        return EXIT_CODES[signal.SIGINT]
    except BrokenPipeError:  # such as `vqmosaic run digits | head`
        with contextlib.suppress(OSError):
            report("error: the output was closed by the program that read it, so the command stopped.")
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            report(f"error: there is too little memory: {' '.join(str(error).split())[:300]}. Close other programs that use it, or process less at a "
                   "time: fewer processes, data.workers or images in a batch. Finished work is kept.")
            return 1
        trace = traceback.format_exc()
        if message_file is None or not another_worker_reported(message_file.parent):
            print(trace, file=sys.stderr)
        return 1


def another_worker_reported(folder: Path, seconds: float = 2.0) -> bool:
    """Whether another worker has written a message, or does so within `seconds`. If so, this one failed only because it lost the connection to it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(folder.glob("*.words")):
            return True
        time.sleep(0.05)
    return False


def check_world_size(world_size: int) -> None:
    """Raise InputError if the launcher started another number of processes than --processes."""
    expected = os.environ.get(PROCESSES_VARIABLE)
    if expected is not None and int(expected) != world_size:
        raise InputError(f"--processes is {expected}, but {world_size} were started; check the accelerate installation and its "
                         "environment variables.")
