"""Plain log lines: rank 0 speaks, other ranks only warn. Torch-free."""

from __future__ import annotations

import logging
import sys

from lgpt.core.distributed import is_rank_zero, rank

_ROOT = "lgpt"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def configure_logging() -> None:
    """Send lgpt's log to stderr as `12:34:56 text`; called once by the command line."""
    logger = logging.getLogger(_ROOT)
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if is_rank_zero() else f"[rank {rank()}] "
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {prefix}%(levelshort)s%(message)s", datefmt="%H:%M:%S")
    )
    handler.addFilter(_shorten_level)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    logger.propagate = False


def _shorten_level(record: logging.LogRecord) -> bool:
    record.levelshort = "" if record.levelno == logging.INFO else f"{record.levelname}: "
    return True
