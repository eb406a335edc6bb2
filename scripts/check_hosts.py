"""Trains the same run in P processes and in one that has all their devices, and compares losses and speed.

  python scripts/check_hosts.py --config configs/gpt2.py:124m --config.data.path=TEXT --config.train.num_steps=30
      --config.optim.warmup_steps=5 --config.train.deterministic=true --config.model.attention=xla

on a host with two GPUs: two processes with one each, then one with both. Exit 1 if losses differ by more than --tolerance.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxlm.metrics.writer import read_metrics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=1e-6, help="largest relative difference of a loss")
    args, train = parser.parse_known_args()
    losses, rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count, each in ((args.processes, args.devices_per_process), (1, args.processes * args.devices_per_process)):
            workdir = Path(folder) / f"{count}x{each}"
            launch = [f"--processes={count}", f"--devices-per-process={each}", f"--logs={workdir}-logs"]
            words = [sys.executable, "-m", "jaxlm.train", *train, "--workdir", str(workdir)]
            code = subprocess.run([sys.executable, "-m", "jaxlm.launch", *launch, "--", *words]).returncode
            if code:
                return code
            steps = [record for record in read_metrics(workdir) if "loss" in record]
            losses.append({record["step"]: record["loss"] for record in steps})
            rates.append(statistics.median(record["tokens_per_s"] for record in steps[len(steps) // 3 :]))
    many, one = losses
    worst = max(abs(many[step] / one[step] - 1) for step in one)
    same = sum(many[step] == one[step] for step in one)
    print(f"{len(one)} losses, {same} of them equal to the last bit, relative difference {worst:.1e} at most")
    each = f"{args.processes} x {args.devices_per_process}"
    print(f"{each}: {rates[0]:,.0f} tokens/s; 1 x {args.processes * args.devices_per_process}: {rates[1]:,.0f}")
    return int(many.keys() != one.keys() or worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
