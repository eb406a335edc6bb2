"""What XLA is asked for beyond its defaults on NVIDIA GPUs.

Per program rather than in XLA_FLAGS: there, a name that this XLA does not know would end the process without a word.
"""

from __future__ import annotations

import os

import jax

from jaxlm.parallel.rules import Layout

Options = dict[str, bool | int | str]

GPU: Options = {
    "xla_gpu_enable_triton_gemm": False,  # products go to cuBLAS, which adds biases, GELU and other products as it writes
    "xla_gpu_dot_merger_threshold_mb": 0,  # of two products of one input made one, each would have to be copied out
    # Exchanges overlap while XLA believes there is room: in four fifths of the memory, less 5 % of what is no argument. A run
    # has .92 of it unless its environment says otherwise (session.py), which this never passes.
    "xla_gpu_memory_limit_slop_factor": 115,
}
ONE_HOST: Options = {  # on several GPUs of one process
    # Gradients that are summed together are copied into one array and out of it again: vectors alone are worth that here;
    # between hosts a message each costs more.
    "xla_gpu_all_reduce_combine_threshold_bytes": 2**20,
}
if jax.__version_info__ >= (0, 11):
    # sums up to 4 MB by XLA's own kernels, which wait for the other GPUs where products could run
    ONE_HOST["xla_gpu_experimental_use_collective_kernels"] = ""
DETERMINISTIC: Options = {"xla_gpu_deterministic_ops": True, "xla_gpu_exclude_nondeterministic_ops": True}


def compiler_options(layout: Layout, *, deterministic: bool) -> Options:
    """Those of a program on this mesh, but for what XLA_FLAGS sets. An unknown one is an error of `compile`, not an abort."""
    processes = {device.process_index for device in layout.mesh.devices.flat}
    named = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    asked = GPU | (ONE_HOST if layout.mesh.size > len(processes) == 1 else {})
    asked = {name: value for name, value in asked.items() if layout.platform == "gpu" and name not in named}
    return asked | (DETERMINISTIC if deterministic else {})
