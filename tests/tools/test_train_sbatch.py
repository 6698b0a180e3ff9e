"""The SLURM script as a cluster runs it: four processes on two machines, a preemption by a real signal, the queue, and the resumed run.

srun and scontrol are stand-ins: the first starts the processes with SLURM's variables and passes SIGTERM on to them, as srun does.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from support.runs import ROOT, read_metrics
from support.torchrun import free_port

SRUN = """#!/bin/bash
processes=()
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" &
    processes+=($!)
done
trap 'kill -TERM "${processes[@]}"' TERM
code=0
for process in "${processes[@]}"; do
    wait "$process"; own=$?
    if [ $own -gt 128 ] && kill -0 "$process" 2>/dev/null; then wait "$process"; own=$?; fi  # wait was interrupted
    if [ $own -gt $code ]; then code=$own; fi
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$QUEUE"; fi
"""


@pytest.mark.slow
def test_a_preempted_job_saves_is_queued_again_and_resumes(flags_of, tmp_path):
    commands, queue = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
        "PATH": f"{commands}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "QUEUE": str(queue),
        "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = ["bash", "tools/train.sbatch", *flags_of("out", "--shard", "--batch_size", 1, "--save_every", 1000)]
    metrics, log = tmp_path / "out" / "metrics.jsonl", (tmp_path / "log").open("w")
    job = subprocess.Popen(
        [*words, "--max_steps", "5000"], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3):
        time.sleep(0.1)
        assert job.poll() is None, (tmp_path / "log").read_text()
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[0]), signal.SIGTERM)  # srun's alone, as --signal=TERM sends it to the steps of a job
    assert job.wait(timeout=120) == 130, (tmp_path / "log").read_text()
    assert queue.read_text() == "requeue 7\n"
    steps = len(read_metrics(tmp_path / "out"))
    done = subprocess.run(
        [*words, "--max_steps", str(steps + 1)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"Resuming from step {steps}" in done.stdout, done.stderr
    assert queue.read_text() == "requeue 7\n"  # a job that is done is not queued
