"""What the processes of a run know of one another: who is missing, refused, silent or gone; and who is told that it is one."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.config import UserError
from jaxlm.opening import own_folder
from jaxlm.parallel.gang import Gang, Limits, free_port
from jaxlm.parallel.multihost import Place, differences, find_place, unused_gpus

# A process of a gang: joins, does what it is told, and prints what became of it. Needs no jax, so it starts in a moment.
MEMBER = """
import os, sys, time
from jaxlm.config import Problem, UserError
from jaxlm.parallel.gang import Gang, Limits
process, count, port, then = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
try:
    limits = Limits(join_s=2, heartbeat_s=2, wait_s=1.5)
    with Gang(process, count, f"127.0.0.1:{port}", name=f"n{process}", limits=limits) as gang:
        gang.at_end.append(lambda: print("last words", flush=True))
        print("names", gang.names, flush=True)
        if then == "sum":
            print("sum", [gang.settle("sum", process + i, sum) for i in range(3)], flush=True)
        if then == "absent":
            time.sleep(60)
        if then in ("late", "await"):
            gang.settle("restoring")
        if then in ("wrong", "right"):
            with gang.together("opening"):
                if then == "wrong":
                    raise UserError(Problem("data.path", "is not there", "mend it"), exit_code=2)
        if then == "fail":
            raise RuntimeError("on fire")
        if then in ("diverge", "diverge slowly"):
            gang.closes()
            time.sleep(1.6 if then == "diverge slowly" else 0)
            raise UserError(Problem("step 3", "diverged", "lower it"), exit_code=4)
        if then == "wait":
            time.sleep(60)
except UserError as error:
    print("error", error.exit_code, str(error).replace(chr(10) + "  ", " | "), flush=True)
    os._exit(error.exit_code)
"""


def start(port, *members):
    """(process, what then) each, in a gang of as many as the largest number and one."""
    count = max(process for process, _ in members) + 1
    return [member(port, process, then, count) for process, then in members]


def member(port, process, then, count):
    args = [sys.executable, "-c", MEMBER, str(process), str(count), str(port), then]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(members):
    said = [process.communicate(timeout=30)[0] for process in members]
    return [process.returncode for process in members], said


def await_line(process):
    assert process.stdout.readline().startswith("names")


@pytest.fixture(scope="module")
def port():
    return free_port()


def test_what_all_say_comes_to_all(port):
    codes, said = ends(start(port, (0, "sum"), (1, "sum"), (2, "sum")))
    assert codes == [0, 0, 0] and all("names ['n0', 'n1', 'n2']\nsum [3, 6, 9]" in text for text in said), said


def test_missing_twice_started_and_misnumbered_processes_are_named():
    port, other, limits = free_port(), free_port(), Limits(join_s=1.5, heartbeat_s=2)
    zero = Gang(0, 3, f"127.0.0.1:{port}", name="n0", limits=limits)

    def enter(gang):
        with pytest.raises(UserError) as error:
            gang.__enter__()
        return f"{error.value.exit_code} {error.value}"

    def gang(process, count, port, name):
        return Gang(process, count, f"127.0.0.1:{port}", name=name, limits=limits)

    with ThreadPoolExecutor(5) as threads:
        waiting = [threads.submit(enter, each) for each in (zero, gang(1, 3, port, "n1"), gang(1, 2, other, "lost"))]
        while not (hasattr(zero, "_hub") and len(zero._hub._members) == 2):
            time.sleep(0.01)
        twice, wrong = (
            threads.submit(enter, gang(*who)).result() for who in ((1, 3, port, "twin"), (2, 4, port, "n2"))
        )
        missing, also, lost = (each.result() for each in waiting)
    for text in (missing, also):
        assert text.startswith("3 process ") and "process 2 of 3 did not come to: start" in text
    assert "process 1 (twin) is there already: n1\n" in twice
    assert "process 2 (n2) says that there are 4 processes, process 0 says 3\n" in wrong
    assert f"process 0 at 127.0.0.1:{other}\n  can't be reached in 2 s: [Errno 111] Connection refused" in lost


def test_a_port_that_is_taken_is_named(port):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}\n  can't listen: Address already in use") as error:
            Gang(0, 2, f"127.0.0.1:{port}", name="a", limits=Limits()).__enter__()
    assert error.value.exit_code == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_gone_or_silent_is_named_and_the_others_leave_at_once(how, victim):
    members = start(free_port(), (0, "wait"), (1, "wait"), (2, "wait"))
    for process in members:
        await_line(process)
    begin = time.monotonic()
    members[victim].send_signal(how)
    others = [process for process in members if process is not members[victim]]
    codes, said = ends(others)
    took_s = time.monotonic() - begin
    members[victim].kill()
    members[victim].communicate()
    assert codes == [3, 3] and all("last words" in text and "newest checkpoint" in text for text in said), said
    why = "closed its connection" if how == signal.SIGKILL else "was silent for "
    assert all(f"error: process {victim} (" in text and why in text for text in said), said
    assert took_s < (1 if how == signal.SIGKILL else 2 + 2)  # heartbeat_s is 2


def test_one_that_fails_tells_why_and_errors_of_one_are_everybodys():
    failing, wrong, late = free_port(), free_port(), free_port()
    same = [start(free_port(), (i, "diverge slowly"), (1 - i, "diverge")) for i in (0, 1)]
    gangs = [
        start(failing, (0, "wait"), (1, "fail")),
        start(wrong, (0, "right"), (1, "wrong")),
        start(late, (0, "await"), (1, "absent"), (2, "late")),
    ]
    (codes, said), others = ends(gangs[0]), gangs[1:]
    assert codes == [3, 1] and "process 1 (n1) left: RuntimeError: on fire" in said[0], said
    codes, said = ends(others[0])
    assert codes == [2, 2] and "error 2 process 1 (n1): data.path | is not there | mend it" in said[0], said
    codes, said = ends(others[1])
    assert codes == [3, 3, 3] and "process 1 (n1) of 3 did not come to: restoring" in said[0], said
    for gang in same:  # the slow one still closes when the other has left: with its own words, and no sooner
        codes, said = ends(gang)
        assert codes == [4, 4] and all(text.endswith("error 4 step 3 | diverged | lower it\n") for text in said), said
        assert not any("last words" in text for text in said), said


def test_the_odd_one_out_is_told_from_the_others():
    facts = [{"lr": 0.1, "jax": "1"}, {"lr": 0.2, "jax": "1"}, {"lr": 0.1, "jax": "1", "extra": None}]
    assert differences(facts) == [("lr", [1], "0.2", "0.1")]
    assert differences([{"a": (1, 2)}, {"a": [1, 2]}]) == []
    assert json.loads(differences([{"a": 1}, {}])[0][2]) is None


def test_a_gpu_that_no_process_of_its_host_uses_is_found():
    eight, one, other = list("01234567"), ["0"], ["1"]
    processes = [("a", 8, eight), ("b", 1, eight), ("c", 4, eight), ("c", 4, eight), ("d", 1, one), ("d", 1, other)]
    assert unused_gpus([*processes, ("e", 2, eight[:4]), ("e", 2, eight[4:])]) == ["b uses 1 of 8", "e uses 4 of 8"]
    assert unused_gpus([("cpu", 0, [])]) == []


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[003,007-009],x1", "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4),2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
K8S = {"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1", "JAX_COORDINATOR_ADDRESS": "run-0-0.run:1234"}


def test_launchers_are_told_apart_and_no_gpu_is_left_behind():
    def slurm(**more):
        return find_place(env=SLURM | more, gpus=8)

    assert slurm() == Place(5, 10, "node003:61664", "SLURM", (4, 5, 6, 7))
    one_each = dict(SLURM_STEP_NUM_TASKS="5", SLURM_STEP_TASKS_PER_NODE="1(x5)", SLURM_PROCID="2", SLURM_LOCALID="0")
    assert slurm(**one_each).gpus is None  # one task a node: all of them
    assert slurm(SLURM_GPUS_PER_TASK="4").gpus is None  # SLURM has dealt them out
    assert slurm(SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="4,5,6,7").gpus is None  # --gpu-bind
    for nodes, first in {
        "gpu-a,gpu-b": "gpu-a",
        "rack[1-2]node[01,03],x": "rack1node01",
        "n[01-02]-ib": "n01-ib",
    }.items():
        assert slurm(SLURM_STEP_NODELIST=nodes).address == f"{first}:61664"
    one_node = dict(SLURM_STEP_TASKS_PER_NODE="10", SLURM_NODEID="0", SLURM_STEP_NODELIST="n1")
    assert slurm(**one_node).address == "127.0.0.1:61664"
    assert find_place(env=OMPI, gpus=8) == Place(3, 4, "10.96.0.1:63808", "Open MPI", (4, 5, 6, 7))
    assert find_place(env=K8S, gpus=8) == Place(1, 2, "run-0-0.run:1234", "Kubernetes")
    assert find_place("a:1", 2, 0, env=SLURM | OMPI) == Place(0, 2, "a:1", "the command line")
    assert find_place(env=SLURM | OMPI, gpus=8).found == "Open MPI"  # which SLURM may have started
    assert find_place(env=SLURM | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) == Place()
    batch_script = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
    assert find_place(env=batch_script) == Place() == find_place(env={})
    for arguments in (("", 2, 0), ("a:1", 2, 2), ("a:1", 0, 1), ("host", 2, 0)):
        with pytest.raises(UserError, match="say all three: --coordinator"):
            find_place(*arguments, env={})
    assert os.environ.get("JAX_NUM_PROCESSES") is None


def test_a_workdir_that_process_0_does_not_have_is_refused(tmp_path):
    def open_folder(process, workdir):
        gang = Gang(process, 2, f"127.0.0.1:{port}", name=f"n{process}", limits=Limits(join_s=20, heartbeat_s=20))
        try:
            with gang, own_folder(gang, workdir) as folder:
                return folder
        except UserError as error:
            return f"{error.exit_code} {error}"

    with ThreadPoolExecutor(2) as threads:
        for names, last in ((("a", "b"), "is not the folder that process 0 has"), (("a", "a"), "")):
            port = free_port()
            zero, one = threads.map(open_folder, (0, 1), (tmp_path / name for name in names))
            if last:
                assert one.startswith("3 ") and last in one and f"process 1 (n1): --workdir={tmp_path / 'b'}" in zero
            else:
                assert zero == tmp_path / "a" and one != zero and not list(zero.iterdir())
