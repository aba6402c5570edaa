"""Maps every way that training can end to an exit code and, if the cause is known, to one message instead of
a traceback.
"""

import sys
from collections.abc import Callable

from octavo.config import ConfigError
from octavo.core import exit_codes
from octavo.core.logging import logger
from octavo.core.terminal import show_uncaught_safely
from octavo.distributed import mesh
from octavo.train.nonfinite_guard import BadNumbers
from octavo.train.signals import Signals, Stopped
from octavo.train.watchdog import Watchdog


def exit_code_of(train: Callable[[Signals, Watchdog], None]) -> int:
    """Call `train` with signal handlers installed and the watchdog running; returns the exit code.

    Errors of unknown cause are raised again, so that their traceback is printed.
    """
    show_uncaught_safely()
    with Signals() as signals, Watchdog() as watchdog:
        if watchdog.asked_to_stop is not None:
            signals.ask(watchdog.asked_to_stop)
        try:
            train(signals, watchdog)
            code = exit_codes.DONE
        except Stopped as stopped:
            logger.info(stopped)
            code = stopped.exit_code
            if not stopped.together:
                return code
        except BadNumbers as error:
            logger.error(error)
            code = exit_codes.BAD_NUMBERS
        except ConfigError as error:
            print(f"octavo: {error}", file=sys.stderr)
            return int(getattr(error, "exit_code", exit_codes.USER_ERROR))
        except Exception as error:
            # Ctrl-C in a terminal also reaches the C++ compiler.
            if signals.received is not None and _is_of_the_compiler(error):
                logger.info("The signal also ended the compiler: %s", str(error).strip().partition("\n")[0])
                return exit_codes.REQUEUE if signals.saves else exit_codes.of_signal(signals.received)
            reason = watchdog.explain(error)
            if reason is None:
                raise
            logger.error(reason)
            return exit_codes.FAILED
        mesh.finish()
    return code


def _is_of_the_compiler(error: Exception) -> bool:
    """Identified by the class's name: importing the class takes a second, and only compiled runs need it."""
    return any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__)
