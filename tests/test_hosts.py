"""Runs of several processes: the same numbers on any number of them, and their ends when one fails or is told to go."""

import signal

import pytest
from hosts import Hosts
from runs import command, make_folder, settings

from jaxlm import train
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.metrics.writer import read_metrics

# The same program in every test of this file, on 8 devices. A constant learning rate: the first steps of a run do not
# depend on how many will follow.
SHORT = settings(
    "train.eval_every=0", "checkpoint.every_steps=4", "log.sample_tokens=0", "optim.warmup_steps=0", "optim.peak_lr=2e-3",
    "model.num_layers=1", "model.dropout=0", "train.accumulate=1", "mesh.data=2", "mesh.fsdp=-1", "optim.schedule=constant",
)  # fmt: skip
TOLERANCE = 1e-6  # sums over devices of several processes take another order: roundings of float32 in a few updates
ENDLESS = settings("train.num_steps=100000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hosts"))


def alone(folder, workdir, steps):
    """Trains `workdir` until step `steps` in this process, on 8 devices."""
    assert train.main(command(folder, workdir, *SHORT, *settings(f"train.num_steps={steps}"))) == 0
    return losses(folder, workdir)


def losses(folder, workdir):
    return {r["step"]: r["loss"] for r in read_metrics(folder / workdir) if "loss" in r}


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    assert max(abs(found[k] - wanted[k]) / wanted[k] for k in wanted) < TOLERANCE


def test_two_processes_told_to_leave_save_one_step_which_one_process_goes_on_from(folder):
    hosts = Hosts(folder, "pair", *SHORT, *ENDLESS, count=2, devices=4)
    hosts.wait_for(r"step 3/")
    hosts.processes[1].send_signal(signal.SIGTERM)
    assert hosts.ends() == [75, 75], hosts.everything()
    assert "SIGTERM: saving after this step" in hosts.said(1) and "step 3/" not in hosts.said(1)
    last = committed_steps(folder / "pair" / "checkpoints")[-1]
    assert last == max(losses(folder, "pair")) and "the same command goes on from here" in hosts.said(0)
    assert_close(alone(folder, "pair", last + 2), alone(folder, "one", last + 2))
