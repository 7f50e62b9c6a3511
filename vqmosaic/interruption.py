"""SIGTERM and SIGINT ask a stage to save and stop; a flag is polled in every loop. A second signal ends it at once."""

import ctypes
import os
import signal

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
PR_SET_PDEATHSIG = 1


class Interrupted(Exception):
    """A stage saved its state and stopped because a signal asked it to; carries the exit code for that signal."""

    def __init__(self, signal_number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {where}. The same command goes on from there.")
        self.exit_code = EXIT_CODES[signal_number]


class StopFlag:
    """A context in which SIGTERM and SIGINT set `.signal` instead of ending the process."""

    def __enter__(self) -> "StopFlag":
        self.signal = 0
        self._before = {number: signal.signal(number, self._remember) for number in EXIT_CODES}
        return self

    def _remember(self, number, _frame) -> None:
        self.signal = number
        for each in EXIT_CODES:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def die_with_parent(ancestor: int) -> None:
    """Ask the kernel (Linux) to kill this process when its parent goes, so that no worker is left behind.

    `ancestor` is the process that started it, directly or through a launcher: where that is gone already, this one ends at once.
    """
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: the launcher's own clean-up has to do
        return
    try:
        os.kill(ancestor, 0)
        is_gone = os.getppid() == 1 != ancestor
    except ProcessLookupError:
        is_gone = True
    if is_gone:  # it went before the request reached the kernel
        os._exit(1)
