"""What a GPU alone can show; all of it is skipped without one.

Velocities, gradients and runs must be those of the CPU within rounding; a step must wait for the GPU once
(`torch.cuda.set_sync_debug_mode`); offloading, fp8, compiled blocks (slow) and NCCL under torchrun must teach the
same.

pytest tests/test_gpu.py
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, ROOT, read_metrics, weights_of
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.model.fp8 import to_fp8
from wandistiller.projection.project import project_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
DEVICE = "cuda"
RUN = ["--device", DEVICE, "--dtype", "fp32", "--lr", 1e-3, "--batch_size", 8]
# All that a step may bring along: rollouts, renoised samples, hidden states, replay
RECIPE = ["--replay", 2, "--student_rollout", 0.5, 1, "--renoise_fraction", 0.5, "--feature_loss_weight", 1]


@pytest.fixture(autouse=True)
def plain_float32():
    """Convolutions in TF32, torch's default, are off by a thousandth; matrix products are not."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def inputs(device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents, embeds = (torch.randn(shape, generator=generator) for shape in ((3, 16, 8, 12), (3, 7, 20)))
    return tuple(
        value.to(device) for value in (latents, torch.tensor([900.0, 500.0, 12.5]), embeds, torch.tensor([7, 1, 0]))
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().float() - expected).norm() / expected.norm())


# ---- velocities ----


def test_velocities_are_those_of_the_cpu(teachers):
    here, _ = project_teacher(teachers.one)
    there, _ = project_teacher(teachers.one, device=DEVICE)
    with torch.no_grad():
        expected = here(*inputs("cpu"))
        assert relative_error(there(*inputs(DEVICE)), expected) < 1e-5
        with torch.autocast(DEVICE, torch.bfloat16):
            assert relative_error(there(*inputs(DEVICE)), expected) < 0.05


def test_velocities_of_fp8_weights_are_those_of_the_cpu(teachers):
    models = [to_fp8(project_teacher(teachers.one, device=device)[0]) for device in ("cpu", DEVICE)]
    with torch.no_grad():
        expected, actual = (model(*inputs(device)) for model, device in zip(models, ("cpu", DEVICE), strict=True))
    assert relative_error(actual, expected) < 1e-5


def test_gradients_are_those_of_the_cpu():
    torch.manual_seed(0)
    here = WanLiteStudent(StudentConfig.from_dict(PRUNED_CONFIG))
    there = WanLiteStudent(here.config).to(DEVICE)
    there.load_state_dict(here.state_dict())
    for model, device in ((here, "cpu"), (there, DEVICE)):
        model(*inputs(device)).square().mean().backward()
    for (name, ours), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-6, msg=name)


# ---- the loop ----


@pytest.mark.parametrize("teacher", ["one", "two"])
@pytest.mark.parametrize(
    "flags", [RECIPE, ["--states", "noise"], ["--student_steps", 2]], ids=["paths", "noise", "few"]
)
def test_a_step_waits_for_the_gpu_once(train, teachers, tmp_path, teacher, flags):
    """Each further step asks the host to wait once more: to see that its loss is finite."""

    def waits(num_steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                folder = tmp_path / f"{teacher}-{num_steps}"
                outcome = train(
                    getattr(teachers, teacher), PRUNED_CONFIG, *RUN, *flags, "--max_steps", num_steps, output_dir=folder
                )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert outcome.code == 0, outcome.err
        return sum("synchroniz" in str(warning.message) for warning in caught)

    waits(20)  # what is made at first use
    assert waits(60) - waits(40) == 20


def test_a_run_follows_that_of_the_cpu(train, teachers, tmp_path):
    assert train(teachers.two, PRUNED_CONFIG, *RUN, *RECIPE, "--max_steps", 20).code == 0
    there = read_metrics(tmp_path / "out")
    flags = [*RUN, "--device", "cpu"]
    assert train(teachers.two, PRUNED_CONFIG, *flags, *RECIPE, "--max_steps", 20, output_dir=tmp_path / "cpu").code == 0
    here = read_metrics(tmp_path / "cpu")
    assert [line["loss"] for line in there] == pytest.approx([line["loss"] for line in here], rel=1e-3)
    assert there[-1]["memory_bytes"] > 0


def test_a_run_that_was_stopped_goes_on(train, teachers, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(teachers.one, PRUNED_CONFIG, *RUN, *RECIPE, "--max_steps", 20, output_dir=whole).code == 0
    flags = [*RUN, *RECIPE, "--save_every", 10, "--lr_scheduler", "constant"]
    for num_steps in (10, 20):
        outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", num_steps, output_dir=parts)
        assert outcome.code == 0, outcome.err
    assert "Resuming from step 10" in outcome.out
    assert len(read_metrics(parts)) == 20


def test_offloaded_experts_teach_the_same(train, teachers, tmp_path):
    flags = [*RUN, "--calls_per_expert", 4, "--max_steps", 20]
    stays, offloaded = tmp_path / "stays", tmp_path / "offloaded"
    assert train(teachers.two, PRUNED_CONFIG, *flags, output_dir=stays).code == 0
    assert train(teachers.two, PRUNED_CONFIG, *flags, "--teacher_offload", output_dir=offloaded).code == 0
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (stays, offloaded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"], ["--teacher_dtype", "fp8"]], ids=str)
def test_bf16_runs_are_near_those_of_float32(train, teachers, tmp_path, flags):
    common = ["--max_steps", 20, "--replay", 1]
    assert train(teachers.one, PRUNED_CONFIG, *RUN, *common, output_dir=tmp_path / "fp32").code == 0
    assert (
        train(teachers.one, PRUNED_CONFIG, *RUN, "--dtype", "bf16", *common, *flags, output_dir=tmp_path / "bf16").code
        == 0
    )
    fp32, bf16 = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.1)


@pytest.mark.slow
def test_compiled_runs_are_near_those_that_are_not(train, teachers, tmp_path):
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        assert (
            train(teachers.one, IDENTITY_CONFIG, *RUN, "--max_steps", 6, *flags, output_dir=tmp_path / name).code == 0
        )
    eager, compiled = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-9)


# ---- torchrun with NCCL ----


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_torchrun_takes_the_steps_of_one_process(train, teachers, write_config, tmp_path, flags):
    alone, launched = tmp_path / "alone", tmp_path / "launched"
    common = [*RUN, "--max_steps", 6]
    assert train(teachers.one, PRUNED_CONFIG, *common, output_dir=alone).code == 0
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 1, ROOT / "train_distillation.py",
        "--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG), "--data_path",
        ROOT / "data" / "static_prompts.txt", "--prompt_cache", teachers.prompt_cache, "--num_samples", 0,
        "--output_dir", launched, "--save_every", 3, *common, *flags,
    ]  # fmt: skip
    words[words.index(DEVICE) - 1 : words.index(DEVICE) + 1] = []  # each process has the GPU of its number
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (alone, launched)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert weights_of(launched).keys() == weights_of(alone).keys()
