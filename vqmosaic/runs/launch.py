"""Starting a stage with one or more processes. Loads no torch; the stage's own module does.

One process runs in place. More run under Accelerate's launcher in a session of their own: signals are forwarded to
the workers themselves (the launcher loses them), their exit codes and last words come back through a folder (the
launcher loses those too), and they die with their parent.
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

from vqmosaic.errors import InputError, nearest_name
from vqmosaic.files.full_disks import DiskFull, naming_any_full_disk, naming_full_disks
from vqmosaic.files.given_paths import check_path, naming_impossible_paths
from vqmosaic.runs.interruption import EXIT_CODES, GRACE_SECONDS, Interrupted, die_with_parent, heeded_signals
from vqmosaic.files.permissions import naming_denied_permissions
from vqmosaic.runs.process_settings import set_up_process

PROCESSES_ASKED_FOR = "VQMOSAIC_PROCESSES"
WORKER_FOLDER = "VQMOSAIC_WORKER_FOLDER"
LAUNCHER_NAME = "launcher"
LAST_SECONDS = 20.0
"""For which a launcher may tidy up after its workers."""
KILL_SECONDS = GRACE_SECONDS + 1.0
"""Seconds after a second signal at which workers that are still there are killed."""
INHERITED_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE",
                   "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE",
                   "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Variables by which launchers tell a process its place in a group. torch and Accelerate would wait for the others."""
SHIPPED_ACCELERATE_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"


def run_stage(module: str, arguments: list[str], processes: int | None = None, accelerate_config: str | None = None) -> int:
    """Exit code of a stage's `main(arguments)` run by this process, or by several workers under Accelerate's launcher.

    `processes` counts those of all machines; None leaves it to the accelerate configuration, and without one is 1.
    """
    processes = processes_to_start(processes, accelerate_config)
    drop_inherited_ranks()
    if processes == 1 and accelerate_config is None:
        return guarded(lambda: importlib.import_module(module).main(arguments))
    command = [sys.executable, "-c", "from vqmosaic.runs.launch import launch_quietly; launch_quietly()"]
    environment, machines = dict(os.environ), 1
    if accelerate_config is not None:
        path = find_accelerate_config(accelerate_config)
        command += ["--config_file", str(path), "--num_processes", str(processes)]
        machines = read_accelerate_config(path).machines
    else:  # without --multi_gpu the launcher starts one process on a CPU machine, and says nothing
        command += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
                    "--dynamo_backend", "no", "--main_process_port", "0"]
    environment[PROCESSES_ASKED_FOR] = str(processes)
    protect_imports(environment)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) * machines // processes)))
    with naming_full_disks(Path(tempfile.gettempdir())):
        temporary = tempfile.TemporaryDirectory(prefix="vqmosaic-workers-")
    with temporary as folder:
        environment[WORKER_FOLDER] = folder
        return wait_for_workers([*command, "-m", module, *arguments], environment, Path(folder), processes // machines)


def drop_inherited_ranks() -> None:
    """Take variables of another launcher's group out of the environment, and say so: this command starts its own processes."""
    inherited = {name: os.environ.pop(name) for name in INHERITED_RANKS if name in os.environ}
    if inherited:
        words = ", ".join(f"{name}={value}" for name, value in inherited.items())
        print(f"note: {words} in the environment ignored: `vqmosaic` starts its own processes (--processes). Under a launcher of your own, start "
              "the stage's module instead, such as `accelerate launch -m stage2_prior.train RECIPE`.", file=sys.stderr)


def protect_imports(environment: dict[str, str]) -> None:
    """Keep modules of the working directory, such as a user's own pipelines/ or accelerate.py, from being imported in the place of the real ones."""
    environment["PYTHONSAFEPATH"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    if os.path.samefile(root, os.getcwd()):  # a checkout that is not installed is found by the working directory alone
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))


def find_accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration given by a path or by the name of one that comes with the package; InputError lists those."""
    check_path("--accelerate_config", name)
    if Path(name).is_file():
        return Path(name)
    shipped = SHIPPED_ACCELERATE_CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(path.stem for path in SHIPPED_ACCELERATE_CONFIGS.glob("*.yaml"))
    nearest = nearest_name(name, names)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    raise InputError(f"--accelerate_config is {name!r}, which is no file and none of the shipped configurations: {', '.join(names)}; "
                     f"`accelerate config` writes one.{hint}")


class AccelerateConfig(NamedTuple):
    """What an accelerate configuration says that is needed before it is used."""

    processes: int | None
    """Of all machines together; None where it does not say."""
    machines: int


def processes_to_start(processes: int | None, accelerate_config: str | None) -> int:
    """How many processes, over all machines: what `processes` says, else the accelerate configuration, else 1.

    Raises InputError for a configuration that is none or says no number, and for a number that its machines cannot share.
    """
    if accelerate_config is None:
        return 1 if processes is None else processes
    path = find_accelerate_config(accelerate_config)
    config = read_accelerate_config(path)
    name, count = ("num_processes", config.processes) if processes is None else ("--processes", processes)
    if count is None:
        raise InputError(f"--accelerate_config {path} says no num_processes; add it, or give --processes.")
    if count % config.machines:
        below = count // config.machines * config.machines
        raise InputError(f"{name} is {count}, and {path} is for {config.machines} machines; it must be a multiple of that, the nearest: "
                         f"{f'{below}, ' if below else ''}{below + config.machines}.")
    return count


def read_accelerate_config(path: Path) -> AccelerateConfig:
    """The numbers of processes and machines in an accelerate configuration; InputError where it is none."""
    try:
        content = yaml.safe_load(path.read_text())
        processes = content.get("num_processes", 1 if content["distributed_type"] == "NO" else None)
        config = AccelerateConfig(None if processes is None else int(processes), int(content.get("num_machines", 1)))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--accelerate_config {path} is no accelerate configuration: {' '.join(str(error).split())}; "
                         "`accelerate config` writes one.") from error
    for name, number in (("num_processes", config.processes), ("num_machines", config.machines)):
        if number is not None and number < 1:
            raise InputError(f"--accelerate_config {path} says {name} is {number}; it must be at least 1.")
    return config


def launch_quietly() -> None:
    """Accelerate's launcher without its traceback for a worker that failed or was stopped: the worker has said why itself."""
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except (ChildFailedError, SignalException):
        sys.exit(1)


def wait_for_workers(command: list[str], environment: dict[str, str], folder: Path, count: int) -> int:
    """Run the launcher of `count` workers, forward signals to those that registered in `folder`, return their exit code."""
    own, launcher, asked_to_stop, to_pass_on = os.getpid(), None, [], []

    def pass_on() -> None:
        while launcher is not None and to_pass_on:
            number = to_pass_on.pop(0)
            workers = [int(text) for path in folder.glob("*.pid") if (text := path.read_text())]
            for process in workers or [launcher.pid]:
                try:
                    os.kill(process, number if workers else signal.SIGTERM)  # a launcher that is importing would print what SIGINT interrupts
                except ProcessLookupError:
                    continue

    def take(number, _frame):
        asked_to_stop.append(number)
        to_pass_on.append(number)
        pass_on()

    before = {number: signal.signal(number, take) for number in heeded_signals()}
    try:
        launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=lambda: die_with_parent(own))
        write_note(folder / LAUNCHER_NAME, str(launcher.pid))
        pass_on()  # what came while there was nobody to tell
        wait_for_launcher(launcher, folder, count, asked_to_stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if all_went_well(folder, count):  # whatever became of launchers afterwards: one goes on alone when that of the first machine has gone
        return 0
    codes = exit_codes(folder)
    failures = [code for code in codes if code]
    for known in (2, *(EXIT_CODES[number] for number in asked_to_stop)):  # what a stage means to say goes before what the launcher made of it
        if known in failures:
            print_words(folder, known)
            return known
    if len(codes) == count and all(code in EXIT_CODES.values() for code in codes):  # another machine was asked, and all stopped together
        print_words(folder, codes[0])
        return codes[0]
    if launcher.returncode and asked_to_stop:  # before there was a worker that could have saved anything
        return EXIT_CODES[asked_to_stop[0]]
    failures = [code for code in failures if code not in EXIT_CODES.values()]  # nobody asked: the launcher ended the others after one died
    if launcher.returncode and not failures:
        if any(folder.glob("*.pid")):
            print("error: a worker process was killed (often: out of memory).", file=sys.stderr)
        else:
            print("error: the worker processes did not start; what is printed above says why.", file=sys.stderr)
    return failures[0] if failures else (launcher.returncode and 1)


def wait_for_launcher(launcher: subprocess.Popen, folder: Path, count: int, asked_to_stop: list[int]) -> None:
    """Wait until the launcher has ended; once all of its workers have said how they ended, for LAST_SECONDS at most.

    Launchers of several machines wait for each other at the end, for five minutes where one is gone already. After a second signal
    (`asked_to_stop` grows as they come), workers and launcher are killed within KILL_SECONDS.
    """
    deadline = kill_at = None
    while True:
        if kill_at is None and len(asked_to_stop) > 1:
            kill_at = time.monotonic() + KILL_SECONDS
        if kill_at is not None and time.monotonic() > kill_at:
            for process in [*(int(text) for path in folder.glob("*.pid") if (text := path.read_text())), launcher.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        try:
            launcher.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            if deadline is None and len(exit_codes(folder)) == count:
                deadline = time.monotonic() + LAST_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                launcher.kill()


def exit_codes(folder: Path) -> list[int]:
    """Of the workers that have ended, as far as they could say so."""
    return [int(text) for path in sorted(folder.glob("*.exit")) if (text := path.read_text())]


def all_went_well(folder: Path, count: int) -> bool:
    """Whether all workers, so many, have ended with 0."""
    codes = exit_codes(folder)
    return len(codes) == count and not any(codes)


def print_words(folder: Path, code: int) -> None:
    """Print what the first of the workers that ended with this code had to say; the others said the same, or followed it."""
    for path in sorted(folder.glob("*.exit")):
        words = path.with_suffix(".words")
        if int(path.read_text()) == code and words.exists():
            print(words.read_text(), file=sys.stderr)
            return


def run_worker(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Entry point of `python -m <stage>`: run main as a worker of a launcher or alone, and exit with its code."""
    set_up_process()
    folder = os.environ.get(WORKER_FOLDER) and Path(os.environ[WORKER_FOLDER])
    rank = int(os.environ.get("RANK", "0"))
    if folder:
        die_with_parent(int((folder / LAUNCHER_NAME).read_text()))

    def work() -> None:
        if folder:
            write_note(folder / f"{rank}.pid", str(os.getpid()))
        main(arguments or no_recipe())

    code = guarded(work, folder / f"{rank}.words" if folder else None)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    if folder:
        with contextlib.suppress(DiskFull):  # the exit code of the launcher tells the parent that something failed
            write_note(folder / f"{rank}.exit", str(code))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # at once: taken apart in order, it could wait for ever for torch's thread that holds a tensor
        os._exit(code)
    leave(code)


def write_note(path: Path, text: str) -> None:
    """Write one of the small files with which workers and parent inform each other. Raises DiskFull, which names the folder."""
    with naming_full_disks(path.parent):
        path.write_text(text)


def leave(code: int) -> None:
    """End the process with this exit code. After a signal, end it immediately: Python would wait for threads that are stuck reading a file."""
    if code in EXIT_CODES.values():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


def no_recipe() -> list[str]:
    """Raises InputError: a stage was started without the recipe that its first argument has to be."""
    raise InputError("no recipe was given; give a shipped name such as digits, a YAML file or a run folder, and overrides after it.")


def guarded(run: Callable[[], None], words: Path | None = None) -> int:
    """Exit code of a call: 0, 2 with words for bad input, 143 or 130 after a signal, 1 with a traceback for anything else.

    The words go to stderr, or into the file `words` for a parent that prints them once for all of its workers.
    """
    def say(text: str) -> None:
        if words is not None:
            with contextlib.suppress(DiskFull):
                write_note(words, text)
                return
        print(text, file=sys.stderr)

    try:
        with naming_denied_permissions(), naming_any_full_disk(), naming_impossible_paths():
            run()
        return 0
    except InputError as error:
        say(f"error: {error}")
        return 2
    except Interrupted as stop:
        say(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:  # before the stage could take note of signals
        return EXIT_CODES[signal.SIGINT]
    except BrokenPipeError:  # such as `vqmosaic run digits | head`
        with contextlib.suppress(OSError):
            say("error: the output was closed by the program that read it, so the command stopped.")
        return 1
    except Exception:
        report = traceback.format_exc()
        if words is None or not another_has_spoken(words.parent):
            print(report, file=sys.stderr)
        return 1


def another_has_spoken(folder: Path, seconds: float = 2.0) -> bool:
    """Whether a worker leaves words within a moment: then the failure of this one is only that the connection to it is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(folder.glob("*.words")):
            return True
        time.sleep(0.05)
    return False


def check_world_size(world_size: int) -> None:
    """Raise InputError when the launcher started another number of processes than was asked for."""
    asked = os.environ.get(PROCESSES_ASKED_FOR)
    if asked is not None and int(asked) != world_size:
        raise InputError(f"--processes {asked} was asked for, but {world_size} were started; check the accelerate installation and its "
                         "environment variables.")
