"""What a command ends with: 0 done, 1 it failed, 2 bad input found before any weight is loaded, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from reprune.errors import ConfigError, RunError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


@contextmanager
def exit_codes(*, working: bool = False, interrupted: str = "") -> Iterator[None]:
    """End the process with a message for a person and the right code where the context raises what is meant for one.

    `working` says that weights are being loaded: whatever goes wrong from then on is a failure, not bad input.
    Anything else is a defect of ours and keeps its trace.
    """
    try:
        yield
    except (ConfigError, OSError) as error:
        problem = (
            str(error) if isinstance(error, ConfigError) else f"{error.filename}: {error.strerror or error}"
        )
        print(f"\nfailed: {problem}\n" if working else f"\n{problem}\n", file=sys.stderr)
        raise SystemExit(FAILED if working else BAD_INPUT) from None
    except RuntimeError as error:
        if not isinstance(error, RunError | _out_of_memory()):
            raise
        print(f"\nfailed: {error}\n", file=sys.stderr)
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        if interrupted:
            print(f"\ninterrupted: {interrupted}\n", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _out_of_memory() -> type[RuntimeError]:
    # Only here: a command that has nothing to compute yet need not wait for torch.
    import torch

    return torch.OutOfMemoryError
