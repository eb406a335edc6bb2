"""Looks at this machine as a run would find it: `python -m jaxlm.doctor`. Every line is ok, a warning, or something to fix.

With processes on several hosts, start it as you would start them (python -m jaxlm.launch, srun, --coordinator): each looks
at its own host, and the bandwidth is that between all devices. Exit 0 if nothing is to fix, else 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checkpoint.space import available_memory_bytes, bytes_text
from jaxlm.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, UserError, derived
from jaxlm.data.loader import Batch
from jaxlm.feed import put_batch
from jaxlm.guards import first_line
from jaxlm.parallel.gang import Limits
from jaxlm.parallel.mesh import make_layout
from jaxlm.parallel.multihost import find_place, join, visible_gpus
from jaxlm.parallel.votes import fastest_s
from jaxlm.settings import Parser, run_main
from jaxlm.step import compile_step, init_state, make_program

# Losses of three updates of the model below, float32, found on CPUs with jax 0.10.2, 0.11.2 and 0.12.0.1.
REFERENCE = (4.119355, 3.848504, 3.704384)
REFERENCE_TOLERANCE = 1e-5  # relative: float32 sums in another order, in three updates
SMALL_DISK_BYTES, SMALL_SHM_BYTES, FEW_FILES = 10 * 2**30, 2**30, 4096
SLOW_BYTES_PER_S = 5e9  # between the GPUs of a host: PCIe gives more, NVLink fifty times as much
BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """level: ok, warning or fix.   remedy: what to do where it is not ok."""

    level: str
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<8}{self.what:<11}{self.found}"
        return line + (f"\n{'':<19}{self.remedy}" if self.remedy else "")


def judged(what: str, found: str, *, fix: str = "", warning: str = "") -> Finding:
    """ok where neither remedy is given."""
    return Finding("fix" if fix else "warning" if warning else "ok", what, found, fix or warning)


def check_python() -> Iterator[Finding]:
    own = "" if sys.prefix != sys.base_prefix else "packages of the system and of others get mixed: use a venv"
    yield judged("python", f"{platform.python_version()} at {sys.executable}", warning=own)


def check_packages() -> Iterator[Finding]:
    """jax, jaxlib and the CUDA plugins are released together: other pairs fail in their own ways."""
    have = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    plugins = {name: version for name, version in have.items() if name.startswith(("jax-cuda", "jax_cuda"))}
    families = {name.replace("_", "-").split("-")[1] for name in plugins}
    beside = {"jaxlib": have["jaxlib"], **plugins}
    extra = f"[{min(families)}]" if len(families) == 1 else "[cuda13]" if families else ""
    mend = f"{sys.executable} -m pip install 'jax{extra}=={have['jax']}'"
    found = ", ".join(f"{name} {version}" for name, version in beside.items())
    yield judged("jax", f"{have['jax']}, {found}", fix=mend if {*beside.values()} != {have["jax"]} else "")
    if len(families) > 1:
        remedy = "uninstall those of all but one CUDA version"
        yield judged("plugins", f"of {' and '.join(sorted(families))}", fix=remedy)
    wanted = importlib.metadata.requires("jaxlm") if "jaxlm" in have else ()
    names = [re.split("[<>=!; ]", line)[0] for line in wanted or () if "extra" not in line]
    lacking = [name for name in names if name not in have and name.replace("_", "-") not in have]
    others = ", ".join(f"{name} {have[name]}" for name in ("flax", "optax", "orbax-checkpoint", "numpy"))
    remedy = f"{sys.executable} -m pip install {' '.join(lacking)}" if lacking else ""
    yield judged("packages", others + "".join(f", no {name}" for name in lacking), fix=remedy)


def check_gpus() -> Iterator[Finding]:
    gpus, devices = len(visible_gpus()), jax.local_devices()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,ecc.errors.uncorrected.volatile.total"]
    query.append("--format=csv,noheader")
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        for i, line in enumerate(said.strip().splitlines()):
            *facts, errors = line.split(", ")
            bad = "its memory fails: take the host out" if errors.isdigit() and int(errors) else ""
            yield judged(f"GPU {i}", ", ".join(facts) + (f", {errors} memory errors" if bad else ""), fix=bad)
    except (OSError, subprocess.SubprocessError) as error:
        if gpus:
            remedy = "install NVIDIA's driver, 580 or newer for CUDA 13"
            yield judged("driver", f"nvidia-smi fails: {error}", fix=remedy)
    used = len(devices) if devices[0].platform == "gpu" else 0
    found = f"{len(devices)} x {devices[0].device_kind}" + (f" of {gpus} visible GPUs" if gpus else "")
    mend = f"{sys.executable} -m pip install 'jax[cuda13]=={jax.__version__}'"
    mend += "; JAX_PLATFORMS=cpu says that CPUs are meant"
    fewer = "JAX_LOCAL_DEVICE_IDS or the launcher gives this process fewer" if 0 < used < gpus else ""
    yield judged("devices", found, fix=mend if gpus and not used else "", warning=fewer)
    if used:
        for name in ("nvidia-nccl-cu12", "nvidia-nccl-cu13"):
            with suppress(importlib.metadata.PackageNotFoundError):
                yield judged("NCCL", f"{importlib.metadata.version(name)} ({name})")


def check_host() -> Iterator[Finding]:
    shm, soft = shutil.disk_usage("/dev/shm"), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    small = len(visible_gpus()) > 1 and shm.total < SMALL_SHM_BYTES
    remedy = "NCCL talks between GPUs through it: docker run --shm-size=16g, or an emptyDir with medium: Memory"
    yield judged("/dev/shm", f"{bytes_text(shm.free)} free of {bytes_text(shm.total)}", fix=remedy if small else "")
    yield judged("files", f"{soft:,} may be open", warning="ulimit -n 65536" if 0 <= soft < FEW_FILES else "")
    if Path("/dev/infiniband").is_dir():
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        free = locked == resource.RLIM_INFINITY
        yield judged("memlock", "unlimited" if free else bytes_text(locked), fix="" if free else "ulimit -l unlimited")
    proxies = sorted(name for name in os.environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy")
    remedy = "unset them for runs of several processes: gRPC would go through them"
    yield judged("proxies", ", ".join(proxies) or "none", warning=remedy if proxies else "")
    disk, memory = shutil.disk_usage(Path.cwd()), available_memory_bytes()
    remedy = "a checkpoint takes 12 bytes a parameter, and two are there at a time"
    small = remedy if disk.free < SMALL_DISK_BYTES else ""
    yield judged("disk", f"{bytes_text(disk.free)} free in {Path.cwd()}", warning=small)
    yield judged("memory", "not known" if memory is None else f"{bytes_text(memory)} available")


def check_numbers() -> Iterator[Finding]:
    """Three updates of a small model, on as many devices as its rows split over, against stored losses."""
    count = gcd(8, jax.device_count()) if jax.process_count() == 1 else jax.device_count()
    losses = reference_losses(jax.devices()[:count])
    off = max(abs(a - b) / b for a, b in zip(losses, REFERENCE, strict=True))
    found = f"three updates, {off:.1e} from the stored losses"
    remedy = "it computes something else: try each device alone (CUDA_VISIBLE_DEVICES), another driver, another jax"
    yield judged("numbers", found, fix=remedy if not off < REFERENCE_TOLERANCE else "")


def reference_losses(devices: Sequence[Any]) -> list[float]:
    model = ModelConfig(vocab_size=61, vocab_multiple=16, num_layers=2, embed_dim=32, num_heads=4, max_seq_len=16)
    train = TrainConfig(num_steps=3, batch_size=8 * len(devices), loss_chunk_tokens=64)
    config = derived(Config(model, train=train, optim=OptimConfig(peak_lr=1e-2), data=DataConfig(train=("",))))
    program = make_program(config, make_layout(config.mesh, devices))
    tokens = (np.arange(8 * 17, dtype=np.int32).reshape(8, 17) * 7 % 61).repeat(train.batch_size // 8, axis=0)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((train.batch_size, 16), np.float32))
    with jax.default_matmul_precision("highest"):
        state, step, losses = init_state(program), compile_step(program), []
        for _ in range(3):
            state, metrics = step(state, put_batch(program, batch))
            losses.append(float(jax.device_get(metrics.loss)))
    return losses


def check_bandwidth() -> Iterator[Finding]:
    """A sum over all devices, as gradients are summed: each sends 2 (n - 1) / n of its buffer."""
    count = jax.device_count()
    if count == 1:
        yield judged("links", "one device: nothing to measure")
        return
    mesh, split = Mesh(np.asarray(jax.devices()), ("all",)), PartitionSpec("all")
    make = jax.jit(lambda: jnp.ones((count, BUFFER_BYTES // 4)), out_shardings=NamedSharding(mesh, split))
    total = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=split, out_specs=PartitionSpec())
    rate = 2 * (count - 1) / count * BUFFER_BYTES / fastest_s(jax.jit(total), make())
    slow = jax.default_backend() == "gpu" and rate < SLOW_BYTES_PER_S
    remedy = "see NCCL_DEBUG=INFO for the way it takes, nvidia-smi topo -m for the ways there are"
    yield judged("links", f"{bytes_text(rate)}/s from each of {count} devices to all", warning=remedy if slow else "")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python, check_packages, check_host, check_gpus, check_numbers, check_bandwidth,
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m jaxlm.doctor", description=__doc__, formatter_class=raw)
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0, of several")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="how many look together")
    parser.add_argument("--process", type=int, default=-1, metavar="I", help="which of them this is")
    args = parser.parse_args(argv)
    worst = 0
    with join(find_place(args.coordinator, args.processes, args.process), Limits()):
        for check in CHECKS:
            try:
                findings = [*check()]
            except UserError:
                raise
            except Exception as error:  # that it fails is what one came to hear
                name = check.__name__.removeprefix("check_")
                findings = [judged(name, first_line(error), fix="a run would fail here too")]
            for finding in findings:
                print(finding, flush=True)
                worst = max(worst, 2 * (finding.level == "fix"))
    return worst


if __name__ == "__main__":
    run_main(main)
