"""Hosts with a network of their own, as separate as one machine can make them: a namespace each, joined by a bridge.

Needs root and `ip netns`, and fails without them: nothing else here shows what a cut cable does. Run with -m nightly.
"""

import re
import subprocess
import time
from pathlib import Path

import pytest
from hosts import Hosts
from runs import make_folder, settings

from jaxlm.checkpoint.layout import committed_steps

pytestmark = pytest.mark.nightly
NUM = 4
NAMES = [f"jaxlm{i}" for i in range(NUM)]
SHORT = settings(
    "train.eval_every=0", "log.sample_tokens=0", "optim.warmup_steps=0", "optim.peak_lr=2e-3", "model.num_layers=1",
    "model.dropout=0", "train.accumulate=1", "mesh.data=2", "mesh.fsdp=-1", "optim.schedule=constant",
    "checkpoint.every_steps=2",
)  # fmt: skip
HEARTBEAT_S = 10  # hosts.QUICK


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network():
    """Namespaces NAMES with addresses 10.77.0.1 and on, each with a host name of its own that the others know."""
    try:
        ip("link", "add", "jaxlm-br", "type", "bridge")
        ip("link", "set", "jaxlm-br", "up")
        table = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(NAMES))
        for i, name in enumerate(NAMES):
            ip("netns", "add", name)
            ip("link", "add", f"jaxlm-v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"jaxlm-v{i}", "master", "jaxlm-br", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(table)
        yield
    finally:
        for i, name in enumerate(NAMES):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            subprocess.run(["ip", "link", "del", f"jaxlm-v{i}"], capture_output=True)
            subprocess.run(["rm", "-r", f"/etc/netns/{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", "jaxlm-br"], capture_output=True)


def gang(folder: Path) -> Hosts:
    inside = 'hostname $0; exec "$@"'
    prefix = {i: ["ip", "netns", "exec", n, "unshare", "--uts", "sh", "-c", inside, n] for i, n in enumerate(NAMES)}
    more = settings("train.num_steps=100000")
    return Hosts(folder, "run", *SHORT, *more, count=NUM, devices=8 // NUM, prefix=prefix, host=NAMES[0])


@pytest.mark.usefixtures("network")
def test_a_host_that_is_cut_off_ends_the_rest_within_its_heartbeat_and_the_rerun_resumes(tmp_path):
    make_folder(tmp_path)
    hosts = gang(tmp_path)
    hosts.wait_for("checkpoint committed")
    ip("link", "set", "jaxlm-v2", "down")
    begin = time.monotonic()
    codes = hosts.ends(limit_s=60)
    took_s = time.monotonic() - begin
    print(f"\ncut off: all gone after {took_s:.1f} s, heartbeat {HEARTBEAT_S} s, exit codes {codes}")
    assert codes == [3] * NUM and took_s < HEARTBEAT_S + 5, hosts.everything()
    for i in (0, 1, 3):
        assert re.search(r"error: process 2 \(jaxlm2, pid \d+\) was silent for 1\d s", hosts.said(i)), (
            hosts.everything()
        )
    assert "error: process 0 (jaxlm0) was silent for 1" in hosts.said(2)
    last = committed_steps(tmp_path / "run" / "checkpoints")[-1]
    ip("link", "set", "jaxlm-v2", "up")
    hosts = gang(tmp_path)
    hosts.wait_for(f"resumes after step {last}")
    hosts.wait_for("checkpoint committed")
    hosts.processes[0].kill()
    begin = time.monotonic()
    codes = hosts.ends(limit_s=60)
    took_s = time.monotonic() - begin
    print(f"killed: all gone after {took_s:.1f} s, exit codes {codes}")
    assert codes[0] == -9 and set(codes[1:]) <= {3, -6} and took_s < HEARTBEAT_S, hosts.everything()
    for i in (1, 2, 3):  # jax's own service may be faster than the words
        assert codes[i] == -6 or "error: process 0 (jaxlm0) closed its connection" in hosts.said(i), hosts.everything()
