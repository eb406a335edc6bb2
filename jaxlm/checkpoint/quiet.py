"""Keeps Orbax's account of its own work, dozens of lines a save at level INFO, out of a run's log.

And the traceback of a failed save, at level ERROR: it comes as an exception, and is told in a line.
"""

import logging


def silence_details() -> None:
    """Drops records other than warnings that come from Orbax's files; everyone else's pass."""
    logging.getLogger("absl").addFilter(_passes)  # Orbax logs through absl; adding a filter twice adds it once


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING or "/orbax/checkpoint/" not in record.pathname
