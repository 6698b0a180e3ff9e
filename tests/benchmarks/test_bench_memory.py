"""benchmarks/bench_memory.py is tested as far as a machine without a GPU allows.

Its step must change the student's weights, and without a GPU the command must say so in one line and exit with 2.

pytest tests/benchmarks/test_bench_memory.py
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_memory
from support.runs import ROOT
from wandistiller.budget.workload import Workload
from wandistiller.model.config import StudentConfig

TINY = StudentConfig(
    block="wan", hidden_size=32, depth=2, num_heads=2, ffn_dim=48, num_channels=48, image_size=64, text_encoder_output_dim=16
)  # fmt: skip


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_its_step_trains(is_checkpointed):
    workload = Workload(teacher=TINY, student=TINY, latent_size=4, batch_size=2)
    step = bench_memory.build_step(replace(workload, gradient_checkpointing=is_checkpointed), False, "cpu")
    for _ in range(3):
        step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2():
    words = [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "CUDA GPU" in line
