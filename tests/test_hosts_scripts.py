"""The launch files: what they say is what the code reads, and they start real processes where what they call is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import make_folder, settings

from jaxlm import doctor
from jaxlm.checkpoint.layout import committed_steps
from jaxlm.config import HostsConfig, TrainConfig
from jaxlm.metrics.writer import read_metrics
from jaxlm.parallel.gang import free_port
from jaxlm.parallel.multihost import LAUNCHERS

SCRIPTS = Path(__file__).parents[1] / "scripts"
SHORT = settings(
    "train.eval_every=0", "log.sample_tokens=0", "optim.warmup_steps=0", "optim.peak_lr=2e-3", "model.num_layers=1",
    "model.dropout=0", "train.accumulate=1", "mesh.data=2", "mesh.fsdp=-1", "optim.schedule=constant", "hosts.join_s=60",
)  # fmt: skip

# Starts what it is told to as SLURM does: a process for each task, which is told its place by the environment.
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes, tasks = 2, int(os.environ["FAKE_TASKS_PER_NODE"])
told = dict(os.environ, SLURM_STEP_NODELIST="localhost,otherhost", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(nodes * tasks))
told["SLURM_STEP_TASKS_PER_NODE"] = f"{tasks}(x{nodes})"
kills = "--kill-on-bad-exit=1" in sys.argv  # as srun does: the first code but 0 ends the others
started = []
for i in range(nodes * tasks):
    own = dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i % tasks), SLURM_NODEID=str(i // tasks))
    started.append(subprocess.Popen(words, env=told | own))
while kills and None in [process.poll() for process in started]:
    time.sleep(0.01)
    if any(process.returncode for process in started):
        for process in started:
            process.terminate()
sys.exit(max(process.wait() % 256 for process in started))
"""
TELL_ONE = """
import os, signal, threading, time
from jaxlm import train
from jaxlm.settings import run_main
save = train.Loop._save
def then_told(self, step, state):
    save(self, step, state)
    if step == 4 and os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
train.Loop._save = then_told
run_main(train.main)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_slurm_job_is_queued_again_when_it_is_preempted_and_goes_on(tmp_path, tasks):
    make_folder(tmp_path)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    # as `python -m jaxlm.train`, but for the signal that SLURM sends before the time is up
    told = f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "$TRAIN" "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/sh\necho "scontrol $*"\n', "told": told}.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = dict(os.environ, PATH=f"{bin_}:{os.environ['PATH']}", SLURM_JOB_ID=str(free_port()), TRAIN=TELL_ONE)
    env |= {
        "FAKE_TASKS_PER_NODE": str(tasks),
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={4 // tasks}"]),
    }
    words = [
        "bash",
        str(SCRIPTS / "slurm.sbatch"),
        "--config",
        str(tmp_path / "tiny.py"),
        "--workdir",
        str(tmp_path / "run"),
    ]
    words += [*SHORT, *settings("checkpoint.every_steps=4", "train.num_steps=400")]
    first = subprocess.run(words, env=env | {"JAXLM_PYTHON": "told"}, capture_output=True, text=True, timeout=200)
    assert first.returncode == 75 and f"scontrol requeue {env['SLURM_JOB_ID']}" in first.stdout, first
    saved = committed_steps(tmp_path / "run" / "checkpoints")[-1]
    again = [*words, *settings(f"train.num_steps={saved + 2}")]
    second = subprocess.run(
        again, env=env | {"JAXLM_PYTHON": sys.executable}, capture_output=True, text=True, timeout=200
    )
    assert second.returncode == 0 and f"resumes after step {saved}" in second.stdout, second
    assert "scontrol" not in second.stdout and "8 x cpu, data=2 x fsdp=4" in second.stdout
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [*range(1, saved + 3)]


@pytest.mark.nightly
def test_a_list_of_hosts_trains_by_one_command(tmp_path):
    make_folder(tmp_path)
    here = tmp_path / "ssh"  # any host is this one
    here.write_text('#!/bin/sh\nshift\nexec sh -c "$1"\n')
    here.chmod(0o755)
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    env = dict(os.environ, JAXLM_SSH=str(here), JAXLM_PYTHON=sys.executable, JAXLM_PORT=str(free_port()))
    env.pop("USER", None)
    env["XLA_FLAGS"] = " ".join([*flags, "--xla_force_host_platform_device_count=4"])
    words = [str(SCRIPTS / "hosts.sh"), "localhost,otherhost", "--config", str(tmp_path / "tiny.py")]
    words += ["--workdir", str(tmp_path / "run"), *SHORT, *settings("train.num_steps=6")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "[0 localhost] step 6/6" in done.stdout, done
    broken = subprocess.run([*words, "--config.no.such=1"], env=env, capture_output=True, text=True, timeout=60)
    assert broken.returncode == 2 and "[1 otherhost] error: no.such=1" in broken.stdout, broken


def test_launch_files_say_what_the_code_reads():
    for name in ("slurm.sbatch", "hosts.sh"):
        subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    grace_s = TrainConfig().preempt_grace_s
    sbatch = (SCRIPTS / "slurm.sbatch").read_text()
    assert int(re.search(r"--signal=TERM@(\d+)", sbatch)[1]) >= grace_s and '"$code" -eq 75' in sbatch
    jobset = yaml.safe_load((SCRIPTS / "kubernetes.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {row["name"]: row["value"] for row in container["env"]}
    (launcher,) = (x for x in LAUNCHERS if x.name == "Kubernetes")
    assert launcher.process == "JOB_COMPLETION_INDEX" and job["completionMode"] == "Indexed"
    assert int(env[launcher.count]) == job["completions"] == job["parallelism"]
    name, hosts = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{hosts}-0-0.{name}:{container['ports'][0]['containerPort']}"
    assert pod["terminationGracePeriodSeconds"] > grace_s and HostsConfig().join_s >= 300
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 4] and job["backoffLimit"] == 0


def test_the_doctor_says_what_is_wrong_and_how_to_mend_it(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("https_proxy", "http://proxy")
    found = {f.what: f for check in (doctor.check_packages, doctor.check_gpus, doctor.check_host) for f in check()}
    assert found["devices"].level == "fix" and "pip install 'jax[cuda13]==" in found["devices"].remedy
    assert found["driver"].level == "fix" and found["proxies"].level == "warning" and found["jax"].level == "ok"
    assert str(found["proxies"]).startswith("warning proxies    https_proxy\n" + " " * 19 + "unset them")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert {f.level for f in doctor.check_gpus()} == {"ok"}


@pytest.mark.nightly
def test_the_doctor_finds_this_machine_sound_and_wrong_numbers_wrong(capsys, monkeypatch):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "from the stored losses" in said and re.search(
        r"ok +links +\S+ \SB/s from each of 8 devices to all", said
    ), said
    monkeypatch.setattr(doctor, "REFERENCE", (*doctor.REFERENCE[:2], doctor.REFERENCE[2] * (1 + 2e-5)))
    (numbers,) = doctor.check_numbers()
    assert numbers.level == "fix"
