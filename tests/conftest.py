"""Settings every test runs under: eight CPU devices, fast compiles, and one compilation cache for the whole run."""

import os
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".xla_cache"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault(
    "NPROC", "16"
)  # XLA's threads: with one a device, two sums ready together can wait for each other for ever
os.environ.setdefault("MPLBACKEND", "Agg")
