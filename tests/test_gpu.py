"""What a GPU alone can show; all of it is skipped without one.

Velocities, gradients and runs must be those of the CPU within rounding; a step must wait for the GPU once
(`torch.cuda.set_sync_debug_mode`); offloading, fp8, compiled blocks (slow) and NCCL under torchrun must teach the
same.
"""

import subprocess
import sys
import warnings

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, ROOT, read_metrics
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.model.fp8 import to_fp8
from wandistiller.projection.project import project_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
DEVICE = "cuda"
RUN = ["--device", DEVICE, "--dtype", "fp32", "--lr", 1e-3, "--batch_size", 8]
# All that a step may bring along: hidden states, replay
RECIPE = ["--replay", 2, "--feature_loss_weight", 1]


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


@pytest.mark.parametrize("teacher", ["one", "two"])
@pytest.mark.parametrize("flags", [RECIPE, ["--student_steps", 2]], ids=["paths", "few"])
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


@pytest.fixture
def losses(train, teachers, tmp_path):
    """Train from a tiny teacher into a folder of this name; return the loss of every step."""

    def run(name: str, *flags: object, teacher: str = "one", config: dict = PRUNED_CONFIG) -> list[float]:
        train(getattr(teachers, teacher), config, *RUN, *flags, output_dir=tmp_path / name).ok()
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    return run


def test_a_run_follows_that_of_the_cpu(losses, tmp_path):
    flags = [*RECIPE, "--max_steps", 20]
    there, here = losses("gpu", *flags, teacher="two"), losses("cpu", *flags, "--device", "cpu", teacher="two")
    assert there == pytest.approx(here, rel=1e-3)
    assert read_metrics(tmp_path / "gpu")[-1]["memory_bytes"] > 0


def test_a_run_that_was_stopped_goes_on(losses):
    flags = [*RECIPE, "--save_every", 10, "--lr_scheduler", "constant"]
    first = losses("out", *flags, "--max_steps", 10)
    assert losses("out", *flags, "--max_steps", 20)[:10] == first


def test_an_offloaded_teacher_teaches_the_same(losses):
    flags = ["--calls_per_expert", 4, "--max_steps", 20]
    stays, *offloaded = (
        losses("stays", *flags, teacher="two"),
        losses("experts", *flags, "--teacher_offload", teacher="two"),
        losses("blocks", *flags, "--teacher_offload", "blocks", teacher="two"),
    )
    assert all(found == pytest.approx(stays, rel=1e-4) for found in offloaded)


@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"], ["--teacher_dtype", "fp8"]], ids=str)
def test_bf16_runs_are_near_those_of_float32(losses, flags):
    common = ["--max_steps", 20, "--replay", 1]
    assert losses("bf16", "--dtype", "bf16", *common, *flags) == pytest.approx(losses("fp32", *common), rel=0.1)


@pytest.mark.slow
def test_compiled_runs_are_near_those_that_are_not(losses):
    eager = losses("eager", "--max_steps", 6, config=IDENTITY_CONFIG)
    compiled = losses("compiled", "--max_steps", 6, "--compile", config=IDENTITY_CONFIG)
    assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_torchrun_takes_the_steps_of_one_process(losses, flags_of, tmp_path, flags):
    alone = losses("alone", "--max_steps", 6)
    words = flags_of("launched", *RUN, "--ema_decay", 0.999, "--max_steps", 6, "--save_every", 3, *flags)
    for _ in range(2):  # each process has the GPU of its number
        del words[(at := words.index("--device")) : at + 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", ROOT / "train_distillation.py"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in read_metrics(tmp_path / "launched")] == pytest.approx(alone, rel=1e-4)
