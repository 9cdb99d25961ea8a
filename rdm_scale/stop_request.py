"""Requests to stop a run: SIGTERM, SIGINT and SIGUSR1, received by a thread from the first moment of the process."""

import os
import signal
import threading
import time

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEATED_S = 1.0  # launchers deliver one request several times; later ones are another request


class StopRequest:
    """Request to finish the step under way, save and exit.

    A thread receives the signals, so that they are noticed even while the main thread waits for other ranks in C code.
    SIGUSR1 is a warning (of a time limit, say) and may be followed by anything. A second SIGTERM or SIGINT of the same
    origin ends the process at once, without saving. The launcher and everybody else are different origins: Ctrl-C in a
    terminal reaches a rank twice, directly and through torchrun.

    Attributes:
        signal_name: name of the first signal, None until there is one.
        by_launcher: whether the launcher sent it. It does so when it is asked to stop, but also to restart its ranks.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.by_launcher = False
        self._launcher = os.getppid()
        self._received_at: dict[bool, float] = {}  # first SIGTERM or SIGINT, by whether the launcher sent it

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def listen(self) -> None:
        """Receive signals from now on. Call it on the main thread before any other thread starts."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # other threads and processes inherit it
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def release(self) -> None:
        """Let signals end the process again, as usual; for work that saves nothing. Call it on the main thread."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def receive(self, number: int, sender: int) -> None:
        """Note a signal of the process `sender`; exits the process if it is the second one."""
        by_launcher = sender == self._launcher and "LOCAL_RANK" in os.environ
        if self.signal_name is None:
            self.signal_name, self.by_launcher = signal.Signals(number).name, by_launcher
        if number == signal.SIGUSR1:
            return
        first = self._received_at.setdefault(by_launcher, time.monotonic())
        if time.monotonic() - first > _REPEATED_S:
            os.write(2, b"a second signal: ending at once, without saving\n")
            os._exit(128 + number)

    def _listen(self) -> None:
        while True:
            received = signal.sigwaitinfo(_SIGNALS)
            self.receive(received.si_signo, received.si_pid)
