"""Keeps Orbax's account of its own work, dozens of lines a save at level INFO, out of a run's log."""

import logging


def silence_details() -> None:
    """Drops records below WARNING that come from Orbax's files; warnings and everyone else's records pass."""
    logging.getLogger("absl").addFilter(_passes)  # Orbax logs through absl; adding a filter twice adds it once


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "/orbax/checkpoint/" not in record.pathname
