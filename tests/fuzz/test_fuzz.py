"""Whatever is damaged of the files that a command reads, it works, or says in one short message why not; strangers are told by name.

Each group of files is damaged in hundreds of ways and given to the public command that reads it, in a forked process with bounds on
its memory and its time. It must exit with 0, or with 2 and one message, open no pickle, run no code, write no escape to the terminal,
and leave all that was not its to write as it was. Of a file that is whole and has a tensor too many, too few, renamed or rescaled, that
tensor must be used, named on the screen, or named in the refusal. With -s the counts by kind and outcome are printed; -m slow
damages 15,000 files.
"""

import collections
import gc
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import evaluate_student
import export_student
import generate_images
import projection_mapper
import train_distillation
from support.damage import Damage, damage
from support.forked import Ended, run_forked
from support.gguf_files import write_wan_gguf
from support.loras import comfyui_keys, random_pairs, write
from support.runs import PRUNED_CONFIG
from support.students import PROMPTS, train_student, write_teacher
from support.wan_folders import write_single_file, write_transformer_folder

LONGEST_MESSAGE = 500  # letters, without the path of the test's own folder
NUM_SLOW_CASES = 15_000
MAINS = {
    "project": projection_mapper.main,
    "draw": generate_images.main,
    "export": export_student.main,
    "evaluate": evaluate_student.main,
    "train": train_distillation.main,
}
PROJECT = "project --output_dir {new}"
OF_STUDENT = "--student {case}/student --teacher_path {case}/teacher"
DRAW = f"draw {OF_STUDENT} --prompt_cache {{case}}/cache --output {{new}} --num_inference_steps 1 --device cpu"
ONE = "--prompt ring"
EXPORT = "export --student {case}/student --output {new} --format"
PIPELINE = f"{EXPORT} pipeline --teacher_path {{case}}/teacher"
EVALUATE = (
    f"evaluate {OF_STUDENT} --prompts_file {{case}}/prompts.txt --prompt_cache {{case}}/cache --num_prompts 1 --num_seeds 1 "
    "--num_inference_steps 1 --device cpu"
)
TRAIN = (
    "train --teacher_path {case}/teacher --student_config {case}/config.json --data_path {case}/prompts.txt --device cpu "
    "--prompt_cache {case}/cache --output_dir {run} --num_samples 0 --save_every 1 --report none"
)
PARTS = "--max_steps 2 --replay 1 --cache_part 1/2 --teacher_cache {case}/begun"


@dataclass(frozen=True)
class Group:
    """Files that are damaged alike, and the command that reads them.

    Attributes:
        parts: what of the house a case needs.
        files: patterns of the files that are damaged.
        few: cases in the default suite.
        idle: a pattern of tensors that the command reads and does not need, beside ComfyUI's markers in whatever file they are.
    """

    parts: str
    files: str
    command: str
    few: int = 8
    idle: str = "$^"


DRAWN = "teacher student cache"
GROUPS = {
    "student config": Group("teacher config.json", "config.json", f"{PROJECT} --teacher_path {{case}}/teacher --student_config {{case}}/config.json", 16),
    "prompts": Group(f"{DRAWN} prompts.txt", "prompts.txt", f"{DRAW} --prompts_file {{case}}/prompts.txt --num_prompts 4"),
    "tables of captions": Group(f"{DRAWN} tables", "tables/*", f"{DRAW} --prompts_file {{case}}/tables --num_prompts 4", 16),
    "prompt templates": Group(f"{DRAWN} templates", "templates/*", f"{DRAW} --prompts_file {{case}}/templates --num_prompts 4"),
    "teacher's JSON": Group("teacher student", "teacher/*.json teacher/[!te]*/*.json", f"{PROJECT} --teacher_path {{case}}/teacher", 20),
    "shard index": Group("sharded", "sharded/*.index.json", f"{PROJECT} --teacher_path {{case}}/sharded"),
    "transformer": Group("single.safetensors", "single.safetensors", f"{PROJECT} --teacher_path {{case}}/single.safetensors", 16),
    "GGUF": Group("wan.gguf", "wan.gguf", f"{PROJECT} --teacher_path {{case}}/wan.gguf"),
    "text encoder": Group("teacher student", "teacher/text_encoder/* teacher/tokenizer/*", f"{DRAW} {ONE}", 20),
    "VAE": Group(DRAWN, "teacher/vae/*", f"{DRAW} {ONE}", 12, r"encoder\.|quant_conv|.*\.time_conv\."),
    "VAE, exported": Group("teacher student", "teacher/vae/*", PIPELINE, 12),
    "LoRA": Group("teacher lora.safetensors", "lora.safetensors", f"{PROJECT} --teacher_path {{case}}/teacher --teacher_lora {{case}}/lora.safetensors", 16),
    "student's record": Group("teacher student", "student/student_config.json", PIPELINE, 16),
    "student's record, drawn": Group(DRAWN, "student/student_config.json", f"{DRAW} {ONE}"),
    "student's weights": Group("teacher student", "student/diffusion_model.safetensors", f"{EXPORT} original", 12),
    "prompt cache": Group(DRAWN, "cache/*/*", f"{DRAW} --prompt a_red_circle"),
    "evaluation": Group(
        f"{DRAWN} prompts.txt",
        "student/evaluation.json student/metrics.jsonl student/samples/* student/gallery.html", EVALUATE, 4,
    ),
    "checkpoints": Group(
        "teacher config.json prompts.txt cache run",
        "run/checkpoints/*.json run/checkpoints/*/* run/metrics.jsonl run/student_config.json", f"{TRAIN} --max_steps 3", 6,
    ),
    "teacher cache": Group("teacher config.json prompts.txt cache answers", "answers/*", f"{TRAIN} --max_steps 2 --teacher_cache {{case}}/answers", 6),
    "teacher cache, begun": Group("teacher config.json prompts.txt cache begun", "begun/*", f"{TRAIN} {PARTS}", 4),
}  # fmt: skip
BY_FILE = ("prompt cache", "checkpoints", "teacher cache", "teacher cache, begun")  # checksums tell what is not whole


def words_of(command: str, case: Path, new: str, run: str) -> tuple[str, list[str]]:
    name, *words = command.format(case=case, new=case / new, run=case / run).split()
    return name, words


# ---- what is damaged ----


def write_tables(folder: Path) -> None:
    """Write a folder with the same captions in every kind of table."""
    folder.mkdir()
    rows = [{"id": index, "caption": caption} for index, caption in enumerate(PROMPTS)]
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "b.csv").write_text('caption,id\n"a red circle",1\n', encoding="utf-8")
    (folder / "c.tsv").write_text("id\tcaption\n1\ta blue square\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "e.txt").write_text("a red circle\n", encoding="utf-8")


def write_templates(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.template.txt").write_text(r"{3::__n__|2$$ and $$x|y} {\{a\}|{b|c}}", encoding="utf-8")
    (folder / "n.txt").write_text("# numbers\n2::one\n__m__\n", encoding="utf-8")
    (folder / "m.txt").write_text("two\nthree\n", encoding="utf-8")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[Path]:
    """Everything that a case takes its parts from, whole; what it is made with is loaded before a case is forked."""
    root = tmp_path_factory.mktemp("house")
    write_teacher(root / "teacher")
    record = {"guidance_scale": 3.0, "num_inference_steps": 4, "shift": 3.0, "negative_prompt": "", "world": "none"}
    (root / "teacher" / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
    write_transformer_folder(root / "sharded", max_shard_size="60KB")
    write_single_file(root / "single.safetensors")
    write_wan_gguf(root / "wan.gguf", heads=1)
    pairs = random_pairs(WanTransformer3DModel.from_pretrained(root / "teacher" / "transformer"))
    write(root / "lora.safetensors", comfyui_keys(pairs, alpha=1.5), {"lora_adapter_metadata": '{"r": 3}'})
    (root / "config.json").write_text(json.dumps(PRUNED_CONFIG), encoding="utf-8")
    made = train_student(root / "made", root / "teacher")
    for name, place in {
        "student": made,
        "cache": made.parent / "cache",
        "prompts.txt": made.parent / "prompts.txt",
    }.items():
        shutil.move(place, root / name)
    write_tables(root / "tables")
    write_templates(root / "templates")
    commands = dict.fromkeys(group.command for group in GROUPS.values())
    for number, command in enumerate([f"{TRAIN} --max_steps 2", *commands]):
        name, words = words_of(command, root, f"warm_{number}", f"run_{number}" if number else "run")
        assert MAINS[name](words) in (0, None), command
    gc.collect()
    gc.freeze()  # else each fork's own collector copies all memory of this process
    yield root
    gc.unfreeze()


# ---- the outcome ----


def results_of(case: Path, group: Group) -> str:
    """A digest of what a command wrote: tensors, pixels and a new prompt cache."""
    found = hashlib.sha256()
    places = ["new", "new.safetensors", *([] if "cache" in group.parts else ["cache"])]
    for place in (case / name for name in places):
        for file in sorted(file for file in (place, *place.rglob("*")) if file.is_file()):
            if file.suffix == ".safetensors":
                for name, tensor in sorted(load_file(file).items()):
                    found.update(name.encode() + tensor.float().numpy().tobytes())
            elif file.suffix == ".png":
                found.update(Image.open(file).tobytes())
    return found.hexdigest()


def outcome_of(done: Damage, ended: Ended, case: Path, group: Group, whole: str) -> str:
    """Return how a stranger's tensor was answered; a `fault` where it was neither used nor told."""
    said = ended.out + ended.err
    if any(name[:60] in said for name in done.names):
        return "refused" if ended.code == 2 else "named"
    if ended.code == 2 and (done.kind in ("without one", "renamed", "reshaped") or "text-to-video models only" in said):
        # Without it the file may be of another kind, whose name is told; of a LoRA the changed matrix is named.
        return "refused by its kind"
    if ended.code == 2:
        return f"fault: refused without its name: {ended.err.strip().replace(str(case), '')[-160:]}"
    if re.match(f"scaled_fp8|logit_scale|{group.idle}", done.names[-1]):
        return "harmless"
    if "Left out: " in said or "Tensors that are no weights: " in said:
        return "told"  # parts of a LoRA for layers that the student does not have; with why they do no harm
    try:
        is_whole = results_of(case, group) == whole
    except SafetensorError:
        is_whole = False
    if done.kind == "renamed":  # to a name with a prefix, which is taken off
        return "used" if is_whole else "fault: taken without a word"
    return "used" if done.may_be_used and not is_whole else "fault: neither used nor named"


def fault_of(ended: Ended, case: Path, before: set[str]) -> str | None:
    """Return what is wrong with the end of a command; None where it worked or was refused as it should be."""
    if ended.code is None:
        return "hang"
    if (case.parent / "bomb").exists():
        return "a pickle was opened, or code run"
    if "\x1b" in ended.out + ended.err:
        return "an escape reached the terminal"
    if "Traceback (most recent call last)" in ended.err:
        lines = ended.err.strip().splitlines()
        places = re.findall(r'File ".*?/(wandistiller/\S+|\w+\.py)", line (\d+)', ended.err)
        return f"traceback: {lines[-1][:160]} at {':'.join(places[-1]) if places else '?'}"
    if written := set(os.listdir(case)) - before - {"new", "new.safetensors", "cache", "run"}:
        return f"wrote {sorted(written)}"
    if copied := [*(case / "new").rglob("evil.py"), *(case / "new").rglob("*.bin")]:
        return f"copied a stranger's {copied[0].name}"
    if ended.code == 2:
        messages = [line.replace(str(case), "") for line in ended.err.splitlines() if "error: " in line]
        if len(messages) != 1 or len(messages[0]) > LONGEST_MESSAGE:
            return f"{len(messages)} messages: {messages[0][:120] if messages else ''}"
        # A run may find damage only when it reads an answer, and then has written what it did until then.
        left = [name for name in ("new", "cache", "run") if name not in before and (case / name).exists()]
        empty = [name for name in left if name == "new" or not any((case / name).iterdir())]
        return f"refused, and {empty[0]} is left" if empty or (case / "new.safetensors").exists() else None
    return None if ended.code == 0 else f"exit code {ended.code}: {ended.err[-200:]}"


def prepare(group: Group, house: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    case = folder / "case"
    case.mkdir(parents=True)
    for part in group.parts.split():
        source = house / part
        shutil.copytree(source, case / part) if source.is_dir() else shutil.copy(source, case / part)
    return case


def run(group: Group, case: Path) -> Ended:
    name, words = words_of(group.command, case, "new", "run")
    return run_forked(MAINS[name], words, case.parent)


def outcomes(name: str, count: int, house: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the kind of damage, its outcome and what was done, case by case."""
    group = GROUPS[name]
    case = prepare(group, house, folder)
    run(group, case)
    whole = results_of(case, group)
    for number in range(count):
        rng, case = random.Random(f"{name} {number}"), prepare(group, house, folder)
        files = sorted(file for pattern in group.files.split() for file in case.glob(pattern) if file.is_file())
        done, before = damage(rng, rng.choice(files), folder / "bomb"), set(os.listdir(case))
        ended = run(group, case)
        outcome = "works" if ended.code == 0 else "refused"
        if fault := fault_of(ended, case, before):
            outcome = f"fault: {fault}"
        elif done.names and name not in BY_FILE:
            outcome = outcome_of(done, ended, case, group, whole)
        yield done.kind, outcome, f"case {number}, {done.about}"


def fuzz(name: str, count: int, house: Path, folder: Path) -> None:
    found: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for kind, outcome, about in outcomes(name, count, house, folder):
        found[kind, outcome].append(about)
    counts = collections.Counter({f"{kind} {outcome}": len(cases) for (kind, outcome), cases in found.items()})
    print(
        f"\n{name}: {counts.total()} cases; " + ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    )
    faults = {outcome: cases for (_, outcome), cases in found.items() if outcome.startswith("fault")}
    assert not faults, "\n".join(f"{len(cases)} x {fault}; first: {cases[0]}" for fault, cases in faults.items())


@pytest.mark.parametrize("name", GROUPS)
def test_damaged_and_strange_files_are_used_or_named_or_refused(house, tmp_path, name):
    fuzz(name, GROUPS[name].few, house, tmp_path / "fuzz")


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_thousands_of_damaged_and_strange_files_are_used_or_named_or_refused(house, tmp_path, name):
    total = sum(group.few for group in GROUPS.values())
    fuzz(name, -(-NUM_SLOW_CASES * GROUPS[name].few // total), house, tmp_path / "fuzz")
