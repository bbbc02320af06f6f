"""SIGTERM and Ctrl-C end a command in order, at any moment, with the status that a shell expects: 143 and 130."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.utilities.exceptions import SIGTERMException

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """End the body with ``SystemExit`` of 128 and the signal's number when a signal to end comes.

    What Lightning and Python make of such a signal gets these numbers too. Handlers that others have set stay.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [each for each in ENDING if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {each: signal.signal(each, _end) for each in ours}
    try:
        yield
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's end of one
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def leave_signals_to_us(trainer: Any) -> None:
    """Let a trainer not handle SIGTERM itself.

    It would only take note, and end after the next training step, if one comes; among several processes it would wait
    for the others inside of the handler. Where a cluster requeues the job it stays as it is.
    """
    if will_be_requeued(trainer):
        if signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    trainer._signal_connector._sigterm_notifier_fn = _let_it_be


def will_be_requeued(trainer: Any) -> bool:
    """Whether a cluster starts the job anew after it has taken the machine away."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def _let_it_be(signum: int, frame: FrameType | None) -> None:
    pass  # a function with a name, which a trainer can take along to processes that are spawned


def _end(signum: int, frame: FrameType | None) -> None:
    if multiprocessing.parent_process() is not None:  # a loader's; the process that made it ends it
        return
    signal.signal(signum, lambda signum, frame: os._exit(128 + signum))  # a second one is impatient
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):  # it would kill this process once it sees the others end
            children, thread._child_processes = thread._child_processes, []
            for child in children:
                if child.poll() is None:
                    child.terminate()
    if signum == signal.SIGINT:
        raise KeyboardInterrupt  # as without us, for those who keep something on the way out
    sys.exit(128 + signum)
