"""--dry_run says what a real run of the full-size A14B would take, from headers alone, and touches nothing.

The checkpoint has true headers, two experts and UMT5-XXL, in files that are holes, so that it takes no disk. Figures
are held against counts made by hand.
"""

import re
from pathlib import Path

import pytest
import torch

import train_distillation
from support.runs import PROMPTS, PRUNED_CONFIG, ROOT, snapshot
from support.wan_folders import write_hollow_a14b
from wandistiller.budget.report import OutOfMemory
from wandistiller.run.flags import parse_args
from wandistiller.run.folder import memory_advice
from wandistiller.run.inputs import read_inputs
from wandistiller.run.resolve import resolve

GIB = 2**30
DEFAULT_CONFIG = ROOT / "config" / "student_config.json"


@pytest.fixture(scope="module")
def a14b(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("a14b") / "Wan2.2-T2V-A14B-Diffusers"
    write_hollow_a14b(folder)
    return folder


@pytest.fixture
def dry_run(run_main, tmp_path):
    """Run the trainer with --dry_run (later flags win) and hold it to writing nothing."""

    def run(*flags: object):
        before = set(tmp_path.rglob("*"))
        outcome = run_main(
            train_distillation.main, "--data_path", PROMPTS, "--output_dir", tmp_path / "out" / "run",
            "--prompt_cache", tmp_path / "cache", "--dry_run", *flags,
        )  # fmt: skip
        assert set(tmp_path.rglob("*")) == before
        return outcome

    return run


def figures(text: str) -> dict[str, float]:
    """The GiB of every line of the tables, of names in several those of the first."""
    lines = re.findall(r"^ {2,4}([a-z][a-z ]+?) +(\d+\.\d\d)  ", text, re.MULTILINE)
    return {name: float(value) for name, value in reversed(lines)}


def a14b_parameters() -> tuple[int, int]:
    """Of one expert, counted by hand from Wan's config; and those that stay in float32."""
    d, ffn, text, freq, patch, layers = 5120, 13824, 4096, 256, 4 * 16, 40
    attention = 4 * (d * d + d) + 2 * d
    block = 2 * attention + 2 * d + (d * ffn + ffn) + (ffn * d + d) + 6 * d
    time_embedding = freq * d + d + d * d + d + (d * 6 * d + 6 * d)
    text_embedding = text * d + d + d * d + d
    ends = (patch * d + d) + (d * patch + patch) + 2 * d
    float32 = time_embedding + 2 * d + layers * (4 * d + 2 * d + 6 * d)
    return layers * block + time_embedding + text_embedding + ends, float32


def test_the_full_size_a14b_from_its_headers(a14b, dry_run):
    done = dry_run(
        "--teacher_path", a14b, "--student_config", DEFAULT_CONFIG, "--save_every", 0, "--assume_gpu", 140,
        "--optimizer", "adamw", "--replay", 1, "--student_steps", "none", "--feature_loss_weight", 0,
    ).ok()  # fmt: skip
    parameters, float32 = a14b_parameters()
    assert parameters == 14_288_491_584
    assert f"teacher 2 x {parameters:,}, student 954,589,760 (6.7% of one)" in done.out
    gib = figures(done.out)
    assert gib["teacher weights"] == pytest.approx(2 * (2 * parameters + 2 * float32) / GIB, abs=0.01)
    student = 954_589_760
    for name, size in {"student weights": 4, "gradients": 4, "optimizer moments": 8, "average of weights": 4}.items():
        assert gib[name] == pytest.approx(size * student / GIB, abs=0.01), name
    assert gib["text encoder"] == pytest.approx(2 * 5_680_910_336 / GIB, abs=0.01)
    assert gib["student"] == pytest.approx(4 * student / GIB, abs=0.01)
    # Gradients come as activations go:
    student_parts = ["student weights", "optimizer moments", "average of weights", "student activations"]
    learning_parts = ["teacher weights", "training states", "reserve", "weights to compute with", *student_parts]
    learning = sum(gib[name] for name in learning_parts)
    assert gib["peak"] == pytest.approx(learning, abs=0.06)
    assert "14 steps of 4 prompts, about 14 teacher calls" in done.out
    tokens, layers, width, ffn = 32 * 32, 40, 5120, 13824
    # q, k, v and two outputs, q of the text, the FFN; scores and sums of self-attention. The text's own share is small.
    forward = layers * (2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width)
    teraflops = float(re.search(r"teacher ([\d.]+) T", done.out)[1])
    assert teraflops == pytest.approx(2 * 4 * forward / 1e12, rel=0.05)
    assert done.out.splitlines()[-1].startswith("Fits: about ")


def test_a_run_that_cannot_fit_says_which_flags_to_change_and_exits_with_2(a14b, dry_run):
    flags = ("--teacher_path", a14b, "--student_config", DEFAULT_CONFIG, "--save_every", 0)
    outcome = dry_run(*flags, "--assume_gpu", 24).refused()
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: --dry_run: Does not fit: at least ") and "--teacher_dtype fp8;" in line
    assert "teacher weights" in outcome.out, "the table is shown all the same"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_plan_is_for_an_assumed_one_and_never_fails(a14b, dry_run):
    flags = ("--teacher_path", a14b, "--student_config", DEFAULT_CONFIG, "--save_every", 0)
    outcome = dry_run(*flags, "--batch_size", 64).ok()
    assert "an assumed GPU, H100" in outcome.out and "May not fit" in outcome.out and "data sheet" in outcome.out


def test_a_small_teacher_is_planned_for_too(dry_run, teachers, write_config, tmp_path):
    config = write_config(PRUNED_CONFIG)
    for teacher in (teachers.two, "mock"):
        before = {} if teacher == "mock" else snapshot(Path(teacher))
        assert "Fits: about" in dry_run("--teacher_path", teacher, "--student_config", config).ok().out
        assert teacher == "mock" or snapshot(Path(teacher)) == before


def test_on_the_cpu_the_plan_is_for_this_machine_and_what_is_free_on_each_disk(dry_run, teachers, write_config):
    run = ["--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG), "--device", "cpu"]
    outcome = dry_run(*run)
    assert outcome.code == 0 and "this machine has" in outcome.out
    assert re.search(r"Fits: about .*; disk of --output_dir, --prompt_cache, .* GiB free\.$", outcome.out)
    outcome = dry_run(*run, "--teacher_cache", "answers", "--teacher_calls", 10**9, "--replay", 1).ok()
    last = outcome.out.splitlines()[-1]
    assert last.startswith("May not fit: disk of --output_dir, ") and "fewer --teacher_calls" in last


def test_a_disk_without_room_for_the_checkpoints_is_refused_as_by_a_real_run(dry_run, teachers, write_config):
    run = ("--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG))
    dry_run(*run, "--keep_checkpoints", 10**9).refused("a smaller --keep_checkpoints")


@pytest.mark.parametrize(
    "words, said", [(["24"], "--dry_run"), (["4080", "--dry_run"], "'4080'"), (["H800", "--dry_run"], "H100, H200")]
)
def test_a_gpu_to_plan_for_is_a_known_one_or_gib_and_goes_with_a_dry_run(run_main, words, said):
    run_main(train_distillation.main, "--assume_gpu", *words).refused(said)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),  # of pinned memory and contexts
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: str(error)[:40],
)  # fmt: skip
def test_out_of_memory_by_any_of_its_names_says_what_takes_less(flags_of, error):
    flags = parse_args(flags_of("out"))
    with pytest.raises(OutOfMemory) as told, memory_advice(resolve(flags, read_inputs(flags))):
        try:
            raise error
        except RuntimeError as cause:
            raise ValueError("a step failed") from cause
    message = str(told.value)
    assert message.startswith("the device is out of memory") and "\n" not in message
    assert "What takes less" in message and "--gradient_checkpointing" in message
    assert told.value.exit_code == 1
