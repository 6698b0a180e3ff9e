"""distill_text_encoder.py makes a small UMT5 that every other command reads, and resumes bit for bit.

Oracles: the teacher itself, for a small encoder of its own shape; transformers and diffusers' WanPipeline, for the exported pipeline;
a run that was never stopped, for one that was. True sizes are those of UMT5-XXL by its headers.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

import distill_text_encoder
import export_student
import train_distillation
from support.runs import PRUNED_CONFIG, ROOT, Outcome, as_if_stopped_after, read_metrics, snapshot
from support.torchrun import start
from support.wan_folders import (
    oracle_velocity,
    relative_error,
    umt5_xxl_shapes,
    write_hollow_file,
    write_hollow_shards,
    write_pipeline_folder,
)
from wandistiller.evaluation.pair import sampling_of
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.run.text_encoder import with_other_words
from wandistiller.sampling.sampler import StudentField, sample
from wandistiller.wan.small_umt5 import cut_umt5
from wandistiller.wan.text_encoder import encode_prompts, token_ids
from wandistiller.wan.text_encoder_files import find_text_encoder

DEMO = ROOT / "data" / "demo_teacher"
SMALL = {"d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 2}
PROMPTS = ["a red circle", "a small blue square on the left", "two green stars, on a white background", "a star"]
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prompts, a config and the demo's embeddings of the prompts."""
    root = tmp_path_factory.mktemp("encoder")
    (root / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (root / "held_out.txt").write_text("a purple triangle\n", encoding="utf-8")
    (root / "small.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return root


def flags(place: Path, **changes: object) -> list[str]:
    values = {
        "teacher_path": DEMO,
        "data_path": place / "prompts.txt",
        "eval_prompts": place / "held_out.txt",
        "text_encoder_config": place / "small.json",
        "prompt_cache": place / "cache",
        "output_dir": place / "small",
        "batch_size": 2,
        "max_steps": STEPS,
        "eval_every": 3,
        "save_every": 2,
        "keep_checkpoints": 9,
        "device": "cpu",
    }
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def student(place) -> Path:
    """A student of the demo teacher after one step."""
    shape = PRUNED_CONFIG | {"hidden_size": 64, "num_heads": 2, "image_size": 64, "text_encoder_output_dim": 128}
    (place / "student.json").write_text(json.dumps(shape), encoding="utf-8")
    paths = {"teacher_path": DEMO, "student_config": place / "student.json", "data_path": place / "prompts.txt"}
    paths |= {"prompt_cache": place / "cache", "output_dir": place / "student"}
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    few = ["--max_steps", "1", "--batch_size", "1", "--num_samples", "0", "--save_every", "0", "--device", "cpu"]
    assert train_distillation.main([*argv, *few]) == 0
    return place / "student"


@pytest.fixture(scope="module")
def small(place, student) -> Path:
    """A small encoder that a whole run has made, with all its checkpoints."""
    assert distill_text_encoder.main(flags(place, student=student)) == 0
    return place / "small"


def test_a_small_encoder_of_the_teachers_own_shape_gives_its_embeddings():
    files = find_text_encoder(DEMO)
    teacher = files.umt5.load(torch.float32)
    ids = torch.tensor([max(token_ids(PROMPTS, files, 512), key=len)])
    mask = torch.ones_like(ids)
    small = cut_umt5(teacher, files.umt5.shape, [(ids, mask)], [0, 1, 2])
    with torch.no_grad():
        expected = teacher(ids, mask).last_hidden_state
        assert relative_error(small(ids, mask), expected) < 1e-5
        before = cut_umt5(teacher, files.umt5.shape | SMALL, [(ids, mask)], [0, 2])
        assert relative_error(before(ids, mask), expected) < 0.9  # a random one is at 1 or beyond


def test_the_run_lowers_the_error_of_the_embeddings_and_of_what_the_student_reads(place, small):
    lines = read_metrics(small)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["feature_loss"] < lines[0]["feature_loss"]
    measured = [line["held_out"] for line in lines if line["held_out"]]
    assert len(measured) == 2 and measured[-1].keys() == {
        "embedding_error",
        "new_word_error",
    }  # purple and triangle are new
    assert (small / "loss.png").is_file()


def test_prompts_are_also_learnt_from_with_a_fifth_of_their_words_replaced_by_any_of_the_vocabulary():
    prompts, words = [" ".join(["red circle"] * 50)] * 20, ["moss", "tin"]
    changed = with_other_words(prompts, words, 0)
    assert changed == with_other_words(prompts, words, 0) != with_other_words(prompts, words, 1)
    counts = Counter(" ".join(changed).split(" "))
    assert counts.keys() == {"red", "circle", "moss", "tin"} and len(set(changed)) == 20
    assert (counts["moss"] + counts["tin"]) / 2000 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_stopped_anywhere_resumes_to_the_same_encoder(place, student, small, tmp_path, damaged):
    again = Path(shutil.copytree(small, tmp_path / "again"))
    as_if_stopped_after(again, 4)
    (again / "model.safetensors").unlink()
    if damaged:
        next((again / "checkpoints" / "step_00000004").iterdir()).write_bytes(b"cut short")
    assert distill_text_encoder.main(flags(place, student=student, output_dir=again)) == 0
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_two_processes_make_the_encoder_of_one(place, small, tmp_path):
    """`small` was made by one process, with batches of 2; its losses to fp32 rounding."""
    words = flags(place, student=place / "student", output_dir=tmp_path / "two", batch_size=1)
    running = start(2, words, tmp_path / "log", distill_text_encoder.main)
    for process in running:
        process.join(240)
    assert [process.exitcode for process in running] == [0, 0], (tmp_path / "log").read_text()
    ours, theirs = ([line["loss"] for line in read_metrics(folder)] for folder in (tmp_path / "two", small))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_another_run_is_not_resumed_and_what_is_replaced_is_kept_beside(place, student, small, tmp_path, run_main):
    again = Path(shutil.copytree(small, tmp_path / "again"))
    outcome = run_main(distill_text_encoder.main, *flags(place, student=student, output_dir=again, seed=1))
    assert outcome.code == 2 and "belongs to a run with seed 0, now 1" in outcome.err
    words = [*flags(place, student=student, output_dir=again, seed=1, max_steps=1), "--overwrite"]
    assert run_main(distill_text_encoder.main, *words).code == 0
    kept = next(again.glob("replaced-*"))
    assert (kept / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


def test_transformers_and_our_commands_read_the_same_small_encoder(place, small, tmp_path):
    """transformers' hidden states times the map are the embeddings that every command takes from the folder."""
    from transformers import UMT5EncoderModel

    files = find_text_encoder(small)
    embeds = encode_prompts(PROMPTS, files, tmp_path / "cache")
    encoder = UMT5EncoderModel.from_pretrained(small, dtype=torch.float32)
    embedding_map = load_file(small / "model.safetensors")["embedding_map.weight"].float()
    for index, ids in enumerate(token_ids(PROMPTS, files, 512)):
        with torch.no_grad():
            hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
        assert relative_error(embeds.read(index)[None], (hidden @ embedding_map.T)[None]) < 1e-5
    assert files.umt5.text_dim == 128 and encoder.config.d_model == SMALL["d_model"]


def test_a_small_encoder_is_no_teacher_of_another(place, small, tmp_path, run_main):
    words = flags(place, teacher_path=small, output_dir=tmp_path / "new")
    run_main(distill_text_encoder.main, *words).refused("its text encoder is a small one itself")


def test_a_pipeline_with_the_small_encoder_draws_what_we_draw_with_it(student, small, tmp_path, run_main):
    """Latents to 1e-4. The map is folded: the pipeline's text encoder and its transformer have the small width, and no map."""
    from diffusers import WanPipeline

    given = ["--student", student, "--text_encoder_path", small]
    out = tmp_path / "pipeline"
    outcome = run_main(export_student.main, *given, "--format", "pipeline", "--dtype", "fp32", "--output", out)
    assert outcome.code == 0, outcome.err
    pipeline = WanPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.text_dim == pipeline.text_encoder.config.d_model == SMALL["d_model"]
    assert "embedding_map.weight" not in load_file(out / "text_encoder" / "model.safetensors")
    embedding_map = load_file(small / "model.safetensors")["embedding_map.weight"].float()
    generator = torch.Generator().manual_seed(1)
    latents, hidden = torch.randn(2, 16, 6, 10, generator=generator), torch.randn(2, 7, 48, generator=generator)
    levels, lengths = torch.tensor([900.0, 250.5]), torch.tensor([7, 3])
    hidden[1, 3:] = 0
    with torch.no_grad():
        expected = WanLiteStudent.from_pretrained(student)(latents, levels, hidden @ embedding_map.T, lengths)
    folded = oracle_velocity(pipeline.transformer, latents, levels, hidden, lengths)
    assert relative_error(folded, expected) < 1e-5

    config, model = StudentConfig.load(student), WanLiteStudent.from_pretrained(student)
    text = encode_prompts(PROMPTS[1:2], find_text_encoder(small), tmp_path / "cache").batch([0])
    options, noise = (
        sampling_of("student", config, None, torch.float32, "cpu"),
        torch.randn(1, 16, 8, 8, generator=generator),
    )
    drawn = pipeline(
        PROMPTS[1], height=64, width=64, num_frames=1, guidance_scale=1.0, latents=noise[:, :, None], output_type="latent",
        num_inference_steps=options.num_inference_steps,
    ).frames[:, :, 0]  # fmt: skip
    assert relative_error(drawn, sample(StudentField(model), noise, *text, options)) < 1e-4


@pytest.mark.slow  # compares files of ten gibibytes
def test_the_shipped_config_makes_at_most_400_million_parameters_of_umt5_xxl(place, tmp_path, run_main):
    write_pipeline_folder(tmp_path / "wan")
    shutil.rmtree(tmp_path / "wan" / "text_encoder")
    write_hollow_shards(tmp_path / "wan" / "text_encoder", "model", umt5_xxl_shapes(), "BF16", 3)
    (tmp_path / "wan" / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "umt5", "d_model": 4096}))
    with torch.device("meta"):
        vae = {name: tuple(tensor.shape) for name, tensor in AutoencoderKLWan().state_dict().items()}
    write_hollow_file(tmp_path / "wan" / "vae" / "diffusion_pytorch_model.safetensors", vae, "F32")
    (tmp_path / "student").mkdir()
    shutil.copy(ROOT / "config" / "student_config_0.5B.json", tmp_path / "student" / "student_config.json")
    before = snapshot(tmp_path)
    shipped = ROOT / "config" / "text_encoder_small.json"
    words = flags(place, teacher_path=tmp_path / "wan", text_encoder_config=shipped, output_dir=tmp_path / "new")
    outcome = run_main(distill_text_encoder.main, *words, "--dry_run", "--student", tmp_path / "student")
    assert outcome.code == 0, outcome.err
    (size,) = re.findall(
        r"a pipeline in bf16 takes ([\d.]+) GiB: student .*, text encoder 0.67 GiB, VAE \(fp32\) 0.47", outcome.out
    )
    assert float(size) <= 3
    assert "359,027,712 parameters of 5,680,910,336 (6.3%), 0.67 GiB in bf16" in outcome.out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (SMALL | {"d_model": 129}, {}, "d_model=129 must be a whole number from 1 to the teacher's 128"),
        (SMALL | {"width": 1}, {}, "'width' is no key of a small text encoder"),
        ({"d_model": 16}, {}, "d_ff=None must be"),
        (SMALL, {"student": "{tmp}/wide"}, "gives embeddings of width 128, teacher and student take 20"),
        (SMALL, {"student": "{tmp}/fits"}, "must hold diffusion_model.safetensors"),
        (SMALL, {"student": "{tmp}/fits", "output_dir": "{tmp}/fits"}, "and not be the --output_dir"),
        (SMALL, {"output_dir": DEMO}, "is where the teacher's text encoder lies"),
        (SMALL, {"teacher_path": "{tmp}/none"}, "there is no text encoder there"),
    ],
)
def test_what_cannot_work_is_one_message_and_nothing_is_written(place, tmp_path, run_main, config, changes, said):
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "student_config.json").write_text(json.dumps(PRUNED_CONFIG))
    (tmp_path / "fits").mkdir()
    fits = PRUNED_CONFIG | {"text_encoder_output_dim": 128}
    (tmp_path / "fits" / "student_config.json").write_text(json.dumps(fits))
    (tmp_path / "config.json").write_text(json.dumps(config))
    changes = {name: str(value).replace("{tmp}", str(tmp_path)) for name, value in changes.items()}
    given = {"text_encoder_config": tmp_path / "config.json", "output_dir": tmp_path / "new"} | changes
    before = snapshot(tmp_path)
    outcome: Outcome = run_main(distill_text_encoder.main, *flags(place, **given))
    assert outcome.code == 2 and said in outcome.err and "Traceback" not in outcome.err
    assert snapshot(tmp_path) == before
