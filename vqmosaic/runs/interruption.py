"""Handles SIGTERM, SIGINT and SIGHUP. The first signal sets a flag. Every loop polls it, saves and stops. A second signal ends the process."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
"""Signals that stop a stage -> the exit code of the process, 128 plus the number of the signal."""
GRACE_SECONDS = 3.0
"""Seconds from the second signal until a process that has not ended by itself is ended."""
PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl: the signal that a process receives when its parent ends."""

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised when a stage has saved its state and stops because of a signal. `exit_code` is the exit code for that signal.

    `kept` says what was saved, as a part of the message, such as "no shard was started". Like KeyboardInterrupt, this is not an Exception, so
    `except Exception` does not catch it.
    """

    def __init__(self, signal_number: int, kept: str):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {kept}. Run the same command to continue.")
        self.exit_code = EXIT_CODES[signal_number]


def handled_signals() -> list[int]:
    """The signals that stop a stage: all of EXIT_CODES, without SIGHUP if it is ignored, as under nohup."""
    return [number for number in EXIT_CODES if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class StopFlag:
    """Context manager in which the first SIGTERM, SIGINT or SIGHUP sets `.signal` to its number instead of ending the process.

    A second signal ends the process. Python runs signal handlers in the main thread, between two bytecode instructions. They do not run while that
    thread waits inside a library, for example for another process. So a second thread also counts signals, and ends the process GRACE_SECONDS after
    the second one.

    Only the main thread can set signal handlers. In other threads `.signal` stays 0.
    """

    def __enter__(self) -> "StopFlag":
        self.signal, self._is_waiting = 0, False
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in handled_signals()}
            self._read_fd, self._write_fd = os.pipe()
            os.set_blocking(self._write_fd, False)
            self._previous_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True, name="signals").start()
        return self

    def _on_signal(self, number, _frame) -> None:
        """Set the flag, and end a wait of wait_for."""
        self.signal = number
        for handled in self._previous_handlers:
            signal.signal(handled, signal.SIG_DFL)  # a second signal ends the process
        if self._is_waiting:
            self._is_waiting = False
            raise Interrupted(number, "what was finished before is kept")  # caught in wait_for

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

    def until_signal(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items until a signal arrives, which ends a wait for the next item immediately, as in `wait_for`."""
        while (item := self.wait_for(lambda: next(items, None))) is not None:
            yield item

    def wait_or_raise(self, call: Callable[[], Any], kept: str | Callable[[], str]) -> Any:
        """The result of `call`, as in `wait_for`. Raises Interrupted with the message `kept`, or what it returns, if a signal has arrived.

        An error of `call` after a signal also raises Interrupted, because Ctrl-C in a terminal ends compilers and other child processes too.
        """
        try:
            result = self.wait_for(call)
        except Exception as error:
            if self.signal:
                raise Interrupted(self.signal, kept if isinstance(kept, str) else kept()) from error
            raise
        if self.signal:
            raise Interrupted(self.signal, kept if isinstance(kept, str) else kept())
        return result

    def _watch(self) -> None:
        """End the process after the second signal of EXIT_CODES. Runs in a thread until __exit__.

        The interpreter writes the number of each signal to the pipe, and __exit__ writes a 0.
        """
        received = 0
        while received < 2:
            number = os.read(self._read_fd, 1)[0]
            if number == 0:
                os.close(self._read_fd)
                return
            received += number in EXIT_CODES
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_CODES[number])

    def __exit__(self, *_) -> None:
        if not self._previous_handlers:
            return
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd, warn_on_full_buffer=False)
        os.write(self._write_fd, b"\0")
        os.close(self._write_fd)


def die_with_parent(ancestor: int) -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, so that no worker is left behind.

    `ancestor` is the ID of the process that started this one, directly or through a launcher. If it has already ended, this process exits at once.
    """
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: only the launcher's own clean-up is left
        return
    try:
        os.kill(ancestor, 0)
        is_gone = os.getppid() == 1 and ancestor != 1  # process 1 becomes the parent of a process whose parent has ended
    except ProcessLookupError:
        is_gone = True
    if is_gone:  # it ended before prctl was called, so the kernel sends no signal
        os._exit(1)
