#!/usr/bin/env bash
# Share a study of quality.py between N processes on one GPU: a small model leaves much of it idle.
#   benchmarks/sharded.sh N <arguments of quality.py without --shard>
set -euo pipefail
count=$1
shift
for ((i = 0; i < count; i++)); do
    OMP_NUM_THREADS=2 PYTHONPATH=.:${PYTHONPATH:-} python3 benchmarks/quality.py "$@" --shard "$i/$count" >"/tmp/shard_$i.log" 2>&1 &
done
wait
tail -qn 1 /tmp/shard_*.log
