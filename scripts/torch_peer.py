# pyright: reportMissingImports=false
# Dims: B batch, T position, D model width, N heads, K kv heads, H head width, F hidden width, V padded vocabulary.
"""The peer in PyTorch: what a step of a GPT of the same numbers takes there, trained as its users train it today.

  bench_step.py --peer starts it. Alone: python scripts/torch_peer.py < jobs (a JSON object a line, the fields of `Job`)

torch.compile, scaled_dot_product_attention, fused AdamW, float32 parameters and moments, compute in bfloat16. On one GPU, and
on replicas, autocast and one compiled model, under DistributedDataParallel; where parameters are split, fully_shard with mixed
precision (gathers in bfloat16, gradients summed in float32) and compiled blocks. A process for each GPU, started here. A job
that does not fit is tried again with checkpointed blocks. Prints a JSON line a job, with "error" where it could not run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import queue
import signal
import socket
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

OUT_OF_MEMORY = "out of memory"
BATCHES = 4


@dataclass(frozen=True)
class Job:
    """What to train. Names and meanings are those of jaxlm's settings but for the first group: rows a step over all devices,
    rows of the vocabulary's table, copies of the parameters and devices that share one (-1: what is left)."""

    rows: int
    vocab_rows: int
    replicas: int
    shards: int
    steps: int
    rounds: int

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    seq_len: int
    position: str
    rope_theta: float
    norm: str
    norm_eps: float
    activation: str
    use_bias: bool
    tie_embeddings: bool
    init_std: float
    dtype: str
    zero: int
    peak_lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float

    checkpointed: bool = False  # each block keeps its input alone

    @property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): products of one input are one matrix."""

    def __init__(self, job: Job):
        super().__init__()
        self.job, heads = job, job.num_heads * job.head_dim
        gates = 2 if job.activation == "swiglu" else 1
        self.norm1, self.norm2 = make_norm(job), make_norm(job)
        self.qkv = nn.Linear(job.embed_dim, heads + 2 * job.num_kv_heads * job.head_dim, bias=job.use_bias)
        self.out = nn.Linear(heads, job.embed_dim, bias=job.use_bias)
        self.up = nn.Linear(job.embed_dim, gates * job.mlp_dim, bias=job.use_bias)
        self.down = nn.Linear(job.mlp_dim, job.embed_dim, bias=job.use_bias)

    def forward(self, x_BTD: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        N, K, H = self.job.num_heads, self.job.num_kv_heads, self.job.head_dim
        B, T, _ = x_BTD.shape
        heads = self.qkv(self.norm1(x_BTD)).view(B, T, N + 2 * K, H).transpose(1, 2)
        q_BNTH, k_BKTH, v_BKTH = heads.split((N, K, K), dim=1)
        if turn is not None:
            q_BNTH, k_BKTH = rotate(q_BNTH, *turn), rotate(k_BKTH, *turn)
        a_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=N != K)
        x_BTD = x_BTD + self.out(a_BNTH.transpose(1, 2).reshape(B, T, N * H))
        up = self.up(self.norm2(x_BTD))
        if self.job.activation == "swiglu":
            up, gate = up.chunk(2, dim=-1)
            return x_BTD + self.down(F.silu(gate) * up)
        return x_BTD + self.down(F.gelu(up, approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        self.tokens = nn.Embedding(job.vocab_rows, job.embed_dim)
        self.positions = nn.Embedding(job.seq_len, job.embed_dim) if job.position == "learned" else None
        blocks = (Block(job) for _ in range(job.num_layers))
        if job.checkpointed:
            blocks = (checkpoint_wrapper(block, preserve_rng_state=False) for block in blocks)
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(job)
        self.head = None if job.tie_embeddings else nn.Linear(job.embed_dim, job.vocab_rows, bias=False)
        self.loss: Callable[..., torch.Tensor] = mean_nats

    def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.tokens(tokens_BT)
        places_T = torch.arange(tokens_BT.shape[1], device=x_BTD.device)
        x_BTD = (x_BTD if self.positions is None else x_BTD + self.positions(places_T)).to(self.job.compute)
        turn = None
        if self.job.position == "rope":
            rates = self.job.rope_theta ** (
                -torch.arange(0, self.job.head_dim, 2, device=x_BTD.device) / self.job.head_dim
            )
            angles_TH = torch.outer(places_T.float(), rates)
            turn = angles_TH.cos(), angles_TH.sin()
        for block in self.blocks:
            x_BTD = block(x_BTD, turn)
        head_VD = self.tokens.weight if self.head is None else self.head.weight
        return self.loss(F.linear(self.norm(x_BTD), head_VD), labels_BT)


def make_norm(job: Job) -> nn.Module:
    if job.norm == "rmsnorm":
        return nn.RMSNorm(job.embed_dim, eps=job.norm_eps)
    return nn.LayerNorm(job.embed_dim, eps=job.norm_eps, bias=job.use_bias)


def rotate(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    a, b = x_BNTH.float().chunk(2, dim=-1)
    return torch.cat((a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH), dim=-1).to(x_BNTH.dtype)


def mean_nats(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())


def init_parameters(model: nn.Module, job: Job) -> None:
    for name, p in model.named_parameters():
        into_residual = name.endswith(("out.weight", "down.weight"))
        if p.ndim == 2:
            nn.init.normal_(p, std=job.init_std / (2 * job.num_layers) ** 0.5 if into_residual else job.init_std)
        else:
            nn.init.zeros_(p) if name.endswith("bias") else nn.init.ones_(p)


def make_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """AdamW; scales and biases do not decay."""
    groups = [
        dict(params=[p for p in model.parameters() if p.ndim == 2], weight_decay=job.weight_decay),
        dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=job.peak_lr, betas=(job.beta1, job.beta2), eps=job.eps, fused=True)


def prepare(job: Job, device: torch.device, *, compiled: bool) -> nn.Module:
    """The model with initial parameters, compiled, and laid out over the processes there are."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    shards = job.shards if job.shards > 0 else world // job.replicas
    replicas = world // shards
    if replicas * shards != world or (job.replicas > 0 and job.replicas != replicas) or job.rows % world:
        raise ValueError(f"{job.rows} rows, {job.replicas} replicas x {job.shards} shards on {world} processes")
    if shards == 1:
        with device:
            model: nn.Module = GPT(job)
        init_parameters(model, job)
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return torch.compile(model) if compiled else model  # pyright: ignore[reportReturnType]
    mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicas", "shards"))
    # inputs are cast by the model itself: angles stay float32
    precision = MixedPrecisionPolicy(param_dtype=job.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings = dict(mesh=mesh if replicas > 1 else mesh["shards"], mp_policy=precision)
    with torch.device("meta"):
        model = GPT(job)
    for block in model.blocks:
        if compiled:
            block.compile()
        fully_shard(block, **settings, reshard_after_forward=job.zero == 3)
    model.loss = torch.compile(mean_nats) if compiled else mean_nats
    fully_shard(model, **settings)
    model.to_empty(device=device)
    init_parameters(model, job)
    return model


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, job: Job, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """One step; its loss is that of this process's rows."""
    casts = job.compute != torch.float32 and not isinstance(model, FSDPModule)  # which casts by itself
    with torch.autocast(tokens.device.type, job.compute) if casts else contextlib.nullcontext():
        loss = model(tokens, labels)
    loss.backward()
    if job.clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def measure(job: Job, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """The first step, then a round to warm up, then the median of the rounds: steps follow one another, a round is waited for
    at its end."""
    begin, cuda, world = (
        time.perf_counter(),
        device.type == "cuda",
        dist.get_world_size() if dist.is_initialized() else 1,
    )
    wait = torch.cuda.synchronize if cuda else lambda: None
    torch.manual_seed(0)
    torch.compiler.reset()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = prepare(job, device, compiled=compiled)
    optimizer = make_optimizer(model, job)
    torch.manual_seed(dist.get_rank() if world > 1 else 0)  # parameters are drawn: each process has rows of its own
    rows = torch.randint(job.vocab_size, (BATCHES, job.rows // world, job.seq_len + 1), device=device)
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    first = update(model, optimizer, job, *batches[0]) / world
    if world > 1:
        dist.all_reduce(first)
    first_loss, compile_s, times_s = first.item(), time.perf_counter() - begin, []
    for _ in range(job.rounds + 1):
        wait()
        begin = time.perf_counter()
        for i in range(job.steps):
            loss = update(model, optimizer, job, *batches[i % BATCHES])
        wait()
        times_s.append((time.perf_counter() - begin) / job.steps)
        assert math.isfinite(loss.item())
    took, counted = statistics.median(times_s[1:]), sum(p.numel() for p in model.parameters())
    counted -= 0 if job.position == "rope" else job.seq_len * job.embed_dim
    counted -= (job.vocab_rows - job.vocab_size) * job.embed_dim * (1 if job.tie_embeddings else 2)
    return dict(
        device=torch.cuda.get_device_name() if cuda else "cpu", devices=world, step_ms=1e3 * took,
        spread=max(times_s[1:]) / min(times_s[1:]) - 1, tokens_per_s=job.rows * job.seq_len / took, compile_s=compile_s,
        memory_bytes=torch.cuda.max_memory_allocated() if cuda else None, first_loss=first_loss,
        counted_params=counted, checkpointed=job.checkpointed,
    )  # fmt: skip


def work(rank: int, world: int, port: int, jobs: Sequence[Job], args: argparse.Namespace, results: Any) -> None:
    """A process of `world`: runs jobs until one fails. Results come from process 0, failures from any."""
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=rank, world_size=world)
    chosen = [SDPBackend.__members__[name] for name in args.attention]
    for job in jobs:
        try:
            with sdpa_kernel(chosen, set_priority=True) if chosen else contextlib.nullcontext():
                result = measure(job, device, compiled=not args.eager)
        except Exception as e:
            traceback.print_exc()
            result = dict(error=reason(e), checkpointed=job.checkpointed)
        if rank == 0 or "error" in result:
            results.put(result)
        if "error" in result:
            return
        if world > 1:
            dist.barrier()  # nobody is ahead of process 0 and what it tells
    if world > 1:
        dist.destroy_process_group()


def reason(e: Exception) -> str:
    """OUT_OF_MEMORY, whichever library said it, or what it is."""
    text = f"{type(e).__name__}: {e}"
    full = any(words in text for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))
    return OUT_OF_MEMORY if full else text


def results_of(jobs: Sequence[Job], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result of each job, in order, until one fails: its processes hold memory and one another, and are ended."""
    context = torch.multiprocessing.get_context("spawn")
    world, results = args.processes or torch.cuda.device_count() or 1, context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    workers = [context.Process(target=work, args=(i, world, port, jobs, args, results)) for i in range(world)]
    try:
        for worker in workers:
            worker.start()
        for _ in jobs:
            yield (result := next_result(results, workers))
            if "error" in result:
                return
        for worker in workers:
            worker.join(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def next_result(results: Any, workers: Sequence[Any]) -> dict[str, Any]:
    while True:
        alive = all(worker.exitcode is None for worker in workers)
        with contextlib.suppress(queue.Empty):
            return results.get(timeout=1)
        if not alive:  # and said nothing
            return dict(error=f"a process ended with {[worker.exitcode for worker in workers]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=0, help="one a GPU if it is not said")
    names = [name for name in SDPBackend.__members__ if name not in ("ERROR", "OVERRIDEABLE")]
    parser.add_argument("--attention", nargs="+", default=[], choices=names, help="in this order, not torch's own")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    waiting = deque(Job(**json.loads(line)) for line in sys.stdin)
    while waiting:
        for result in results_of(list(waiting), args):
            job = waiting.popleft()
            if result.get("error") == OUT_OF_MEMORY and not job.checkpointed:
                waiting.appendleft(dataclasses.replace(job, checkpointed=True))
            else:
                print(json.dumps(dict(peer=f"torch {torch.__version__}") | result), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1" if torch.cuda.is_available() else str(os.cpu_count()))
    main()
