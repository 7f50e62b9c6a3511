"""SIGTERM, SIGINT and SIGHUP ask a stage to save and stop; a flag is polled in every loop. A second signal ends it at once."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
GRACE_SECONDS = 3.0
"""Seconds after a second signal at which a process ends that could not react to the first one."""
PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A stage saved its state and stopped because a signal asked it to; carries the exit code for that signal.

    Like KeyboardInterrupt, it is not an Exception, so that code that handles any failure of a library does not catch it.
    """

    def __init__(self, signal_number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {where}. The same command goes on from there.")
        self.exit_code = EXIT_CODES[signal_number]


def heeded_signals() -> list[int]:
    """The signals that stop a stage: all of EXIT_CODES, but not SIGHUP where it is ignored, as under nohup."""
    return [number for number in EXIT_CODES if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class StopFlag:
    """A context in which SIGTERM, SIGINT and SIGHUP set `.signal` instead of ending the process.

    Python runs signal handlers between two instructions of the main thread, which never come where that thread waits inside a library, for example
    for another process. So a thread of its own counts signals too, and ends the process GRACE_SECONDS after the second one.

    Outside the main thread no signal can be heeded: `.signal` stays 0 there.
    """

    def __enter__(self) -> "StopFlag":
        self.signal, self._is_waiting = 0, False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in heeded_signals()}
            self._reading_end, self._writing_end = os.pipe()
            os.set_blocking(self._writing_end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writing_end, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def _remember(self, number, _frame) -> None:
        self.signal = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self._is_waiting:
            self._is_waiting = False
            raise Interrupted(number, "what was finished before is kept")

    def wait_for(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, or None if a signal has arrived. The first signal ends the wait immediately.

        Use this only for calls that wait or read. After a signal, do not use the objects that `call` was working with.
        """
        if self.signal:
            return None
        try:
            self._is_waiting = True
            return call()
        except Interrupted:
            return None
        finally:
            self._is_waiting = False

    def wait_or_leave(self, call: Callable[[], Any], where: str) -> Any:
        """The result of `call`, as in `wait_for`. Raises Interrupted if a signal has arrived; `where` says what is kept.

        An error after a signal is treated as its effect: Ctrl-C in a terminal also ends compilers and other child processes.
        """
        try:
            result = self.wait_for(call)
        except Exception as error:
            if self.signal:
                raise Interrupted(self.signal, where) from error
            raise
        if self.signal:
            raise Interrupted(self.signal, where)
        return result

    def _watch(self) -> None:
        """Read the numbers of signals, which the interpreter writes as they come, until a 0 or the second one."""
        received = 0
        while received < 2:
            number = os.read(self._reading_end, 1)[0]
            if number == 0:
                os.close(self._reading_end)
                return
            received += number in EXIT_CODES
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_CODES[number])

    def __exit__(self, *_) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before, warn_on_full_buffer=False)
        os.write(self._writing_end, b"\0")
        os.close(self._writing_end)


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
