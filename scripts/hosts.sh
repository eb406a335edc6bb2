#!/bin/bash
# Trains on hosts that ssh reaches without a password, one process each, which has all GPUs of its host:
#
#   scripts/hosts.sh node1,node2 --config configs/gpt2.py:124m --workdir /shared/runs/gpt2
#
# The first host is process 0. Every host needs this folder, the same Python and the workdir at the same paths.
# Ctrl-C here makes all of them save and leave; one that fails ends the others. The exit code is that of the first that
# did not end with 0.
# JAXLM_PYTHON: the interpreter on the hosts (default: python3).   JAXLM_PORT: of process 0 (default: 61399).
# JAXLM_SSH: instead of ssh, for example "ssh -i key".
set -u

if [ $# -lt 2 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
IFS=, read -r -a hosts <<<"$1"
shift
ssh=${JAXLM_SSH:-ssh}
address=${hosts[0]}:${JAXLM_PORT:-61399}
mark=/tmp/jaxlm-${USER:-$(id -un)}-$$ # on each host: the number of its process, for the signal

pids=()
for i in "${!hosts[@]}"; do
    train=("${JAXLM_PYTHON:-python3}" -u -m jaxlm.train "$@"
        --coordinator "$address" --processes "${#hosts[@]}" --process "$i")
    # NCCL_DEBUG=WARN: one line where a connection fails
    $ssh "${hosts[i]}" "cd $(printf %q "$PWD") && echo \$\$ >$mark-$i &&
        NCCL_DEBUG=${NCCL_DEBUG:-WARN} exec $(printf '%q ' "${train[@]}")" \
        </dev/null > >(trap '' INT TERM; exec sed -u "s/^/[$i ${hosts[i]}] /") 2>&1 &
    pids+=($!)
done
# one is enough: what one is told, all of them hear
trap '$ssh "${hosts[0]}" "kill -TERM \$(cat $mark-0)"' INT TERM

code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal interrupts a wait
    wait "$pid"
    ended=$?
    [ "$code" -eq 0 ] && code=$ended
done
for i in "${!hosts[@]}"; do $ssh "${hosts[i]}" "rm -f $mark-$i" </dev/null; done
exit "$code"
