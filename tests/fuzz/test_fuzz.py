"""Whatever is damaged of the files that a command reads, it works, or says in one short message why not.

Each group of files is damaged in hundreds of ways that hypothesis draws, and given to the public command that reads it, in a
forked process with bounds on its memory and its time. It must exit with 0, or with 2 and one message, open no pickle, and
leave all that was not its to write as it was. With -s the counts are printed; -m slow damages ten thousand files.

pytest tests/fuzz/test_fuzz.py
"""

import collections
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from diffusers import WanTransformer3DModel
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import evaluate_student
import export_student
import generate_images
import projection_mapper
import train_distillation
from support.damage import IN_BYTES, IN_GGUF, IN_JSON, IN_PLACE, IN_TENSORS, Damage, apply, damages
from support.forked import Ended, run_forked
from support.gguf_files import write_wan_gguf
from support.loras import comfyui_keys, random_pairs, write
from support.runs import PRUNED_CONFIG
from support.scorer_models import save_scorer
from support.students import PROMPTS, train_student, write_teacher
from support.wan_folders import write_single_file, write_transformer_folder

LONGEST_MESSAGE = 500  # letters, without the path of the test's own folder
Command = Callable[[Path], tuple[Callable, list[object]]]


@dataclass(frozen=True)
class Group:
    """Files that are damaged alike, and the command that reads them.

    Attributes:
        parts: what of the house a case needs.
        files: patterns of the files that are damaged.
        command: returns the command and its arguments, given the folder of a case.
        few, many: so many cases in the default and in the slow suite.
    """

    parts: list[str]
    files: list[str]
    kinds: list[str]
    command: Command
    few: int
    many: int = 700


def project(*flags: object, teacher: str = "teacher") -> Command:
    return lambda case: (
        projection_mapper.main,
        ["--teacher_path", case / teacher, "--output_dir", case / "new", *flags],
    )


def project_student(case: Path) -> tuple[Callable, list[object]]:
    main, argv = project()(case)
    return main, [*argv, "--student_config", case / "config.json"]


def project_with_lora(case: Path) -> tuple[Callable, list[object]]:
    main, argv = project()(case)
    return main, [*argv, "--teacher_lora", case / "lora.safetensors"]


def cut_lora(case: Path) -> tuple[Callable, list[object]]:
    argv = ["--lora", case / "lora.safetensors", "--student", case / "student", "--output", case / "new.safetensors"]
    return projection_mapper.main, argv


def draw(*flags: object, prompts: str = "") -> Command:
    def command(case: Path) -> tuple[Callable, list[object]]:
        text = ["--prompts_file", case / prompts, "--num_prompts", 4] if prompts else ["--prompt", "a red circle"]
        places = ["--student", case / "student", "--prompt_cache", case / "cache", "--output", case / "new"]
        teacher = ["--teacher_path", case / "teacher"]
        return generate_images.main, [*places, *teacher, *text, "--num_inference_steps", 1, "--device", "cpu", *flags]

    return command


def export(case: Path) -> tuple[Callable, list[object]]:
    return export_student.main, ["--student", case / "student", "--format", "original", "--output", case / "new"]


def export_pipeline(case: Path) -> tuple[Callable, list[object]]:
    argv = ["--student", case / "student", "--format", "pipeline", "--output", case / "new"]
    return export_student.main, [*argv, "--teacher_path", case / "teacher"]


def evaluate(case: Path) -> tuple[Callable, list[object]]:
    argv = ["--student", case / "student", "--prompts_file", case / "prompts.txt", "--prompt_cache", case / "cache"]
    argv += ["--teacher_path", case / "teacher", "--num_prompts", 1, "--num_seeds", 1, "--num_inference_steps", 1]
    return evaluate_student.main, [*argv, "--device", "cpu"]


def score(case: Path) -> tuple[Callable, list[object]]:
    main, argv = evaluate(case)
    scorers = ["--scorer", f"clip={case / 'clip'}", "--scorer", f"dino={case / 'dino'}", "--output", case / "new"]
    return main, [*argv, *scorers]


def train(*flags: object) -> Command:
    """Train on from the run in the case's folder, with its own teacher and cache."""

    def command(case: Path) -> tuple[Callable, list[object]]:
        argv = ["--teacher_path", case / "teacher", "--student_config", case / "config.json"]
        argv += ["--data_path", case / "prompts.txt", "--prompt_cache", case / "cache", "--output_dir", case / "run"]
        argv += ["--num_samples", 0, "--save_every", 1, "--report", "none", "--device", "cpu"]
        return train_distillation.main, [*argv, *[flag.format(case=case) for flag in map(str, flags)]]

    return command


IN_PARTS = ("--max_steps", 2, "--replay", 1, "--cache_part", "1/2", "--teacher_cache")
SHARED_TEACHER = ["teacher", "student"]
GROUPS = {
    "student config": Group(["teacher", "config.json"], ["config.json"], IN_JSON + IN_BYTES + IN_PLACE, project_student, 30, 1000),
    "prompts": Group(
        [*SHARED_TEACHER, "cache", "prompts.txt"], ["prompts.txt"], IN_BYTES + IN_PLACE, draw(prompts="prompts.txt"), 20
    ),
    "tables of captions": Group(
        [*SHARED_TEACHER, "cache", "tables"], ["tables/*"], IN_JSON + IN_BYTES + IN_PLACE, draw(prompts="tables"), 24
    ),
    "prompt templates": Group(
        [*SHARED_TEACHER, "cache", "templates"], ["templates/*"], IN_BYTES + IN_PLACE, draw(prompts="templates"), 12
    ),
    "teacher's JSON": Group(
        ["teacher"],
        ["teacher/*.json", "teacher/transformer/*.json", "teacher/vae/*.json", "teacher/scheduler/*.json"],
        IN_JSON + IN_BYTES + IN_PLACE,
        project(),
        30,
        1200,
    ),
    "shard index": Group(["sharded"], ["sharded/*.index.json"], IN_JSON + IN_BYTES + IN_PLACE, project(teacher="sharded"), 20),
    "teacher's weights": Group(
        ["single.safetensors"], ["single.safetensors"], IN_TENSORS + IN_BYTES + IN_PLACE, project(teacher="single.safetensors"), 20
    ),
    "GGUF": Group(["wan.gguf"], ["wan.gguf"], IN_GGUF + IN_BYTES + IN_PLACE, project(teacher="wan.gguf"), 30),
    "text encoder": Group(
        SHARED_TEACHER,
        ["teacher/text_encoder/*", "teacher/tokenizer/*"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        draw(),
        14,
    ),
    "VAE": Group(
        [*SHARED_TEACHER, "cache"], ["teacher/vae/*"], IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE, export_pipeline, 20
    ),
    "LoRA": Group(
        ["teacher", "lora.safetensors"], ["lora.safetensors"], IN_TENSORS + IN_BYTES + IN_PLACE, project_with_lora, 25
    ),
    "student's selection": Group(
        ["lora.safetensors", "student"],
        ["student/projection_report.json", "lora.safetensors"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        cut_lora,
        30,
    ),
    "student's record": Group(
        SHARED_TEACHER, ["student/student_config.json"], IN_JSON + IN_BYTES + IN_PLACE, export_pipeline, 25, 1000
    ),
    "student's record, drawn": Group(
        [*SHARED_TEACHER, "cache"], ["student/student_config.json"], IN_JSON, draw(), 15
    ),
    "student's weights": Group(
        SHARED_TEACHER, ["student/diffusion_model.safetensors"], IN_TENSORS + IN_BYTES + IN_PLACE, export, 25
    ),
}  # fmt: skip
# Files that a run writes and reads again
RUN_GROUPS = {
    "prompt cache": Group([*SHARED_TEACHER, "cache"], ["cache/*/*"], IN_TENSORS + IN_BYTES + IN_PLACE, draw(), 8),
    "evaluation": Group(
        [*SHARED_TEACHER, "cache", "prompts.txt"],
        [
            "student/evaluation.json",
            "student/metrics.jsonl",
            "student/README.md",
            "student/samples/*",
            "student/gallery.html",
        ],
        IN_JSON + IN_BYTES + IN_PLACE,
        evaluate,
        5,
        300,
    ),
    "scorers": Group(
        [*SHARED_TEACHER, "cache", "prompts.txt", "clip", "dino"],
        ["clip/*", "dino/*"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        score,
        10,
        400,
    ),
    "checkpoints": Group(
        ["teacher", "config.json", "prompts.txt", "cache", "run"],
        ["run/checkpoints/*.json", "run/checkpoints/*/*", "run/metrics.jsonl", "run/student_config.json"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        train("--max_steps", 3),
        6,
        450,
    ),
    "teacher cache": Group(
        ["teacher", "config.json", "prompts.txt", "cache", "answers"],
        ["answers/*"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        train("--max_steps", 2, "--teacher_cache", "{case}/answers"),
        6,
        450,
    ),
    "teacher cache of several builders": Group(
        ["teacher", "config.json", "prompts.txt", "cache", "begun"],
        ["begun/*"],
        IN_JSON + IN_TENSORS + IN_BYTES + IN_PLACE,
        train(*IN_PARTS, "{case}/begun"),
        3,
        300,
    ),
}


def write_tables(folder: Path) -> None:
    """Write a folder with the same captions in every kind of table."""
    folder.mkdir()
    rows = [{"id": index, "caption": caption} for index, caption in enumerate(PROMPTS)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.csv").write_text('caption,id\n"a red circle",1\n', encoding="utf-8")
    (folder / "c.tsv").write_text("id\tcaption\n1\ta blue square\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "e.txt").write_text("a red circle\n", encoding="utf-8")


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Everything that a case takes its parts from, whole; what it is made with is loaded before a case is forked."""
    root = tmp_path_factory.mktemp("house")
    write_teacher(root / "teacher")
    record = {"guidance_scale": 3.0, "num_inference_steps": 4, "shift": 3.0, "negative_prompt": "", "world": "none"}
    (root / "teacher" / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
    write_transformer_folder(root / "sharded", max_shard_size="60KB")
    write_single_file(root / "single.safetensors")
    write_wan_gguf(root / "wan.gguf", heads=1)
    for kind in ("clip", "dino"):
        save_scorer(kind, root / kind)
    model = WanTransformer3DModel.from_pretrained(root / "teacher" / "transformer")
    write(
        root / "lora.safetensors", comfyui_keys(random_pairs(model), alpha=1.5), {"lora_adapter_metadata": '{"r": 3}'}
    )
    (root / "config.json").write_text(json.dumps(PRUNED_CONFIG), encoding="utf-8")
    made = train_student(root / "made", root / "teacher")
    for name, place in {
        "student": made,
        "cache": root / "made" / "cache",
        "prompts.txt": root / "made" / "prompts.txt",
    }.items():
        shutil.move(place, root / name)
    write_tables(root / "tables")
    (root / "templates").mkdir()
    (root / "templates" / "a.template.txt").write_text(r"{3::__n__|2$$ and $$x|y} {\{a\}|{b|c}}", encoding="utf-8")
    (root / "templates" / "n.txt").write_text("# numbers\n2::one\n__m__\n", encoding="utf-8")
    (root / "templates" / "m.txt").write_text("two\nthree\n", encoding="utf-8")
    for command in (score, evaluate):
        main, argv = command(root)
        argv = [root / "warm_score" if word == root / "new" else word for word in argv]
        assert main(list(map(str, argv))) == 0
    for flags in (("--max_steps", 2, "--teacher_cache", "{case}/answers"), ("--max_steps", 2, "--overwrite")):
        main, argv = train(*flags)(root)
        assert main(list(map(str, argv))) == 0
    main, argv = train(*IN_PARTS, "{case}/begun")(root)
    assert main(list(map(str, argv))) == 0
    for number, command in enumerate((project_student, project_with_lora, cut_lora, draw(), export, export_pipeline)):
        main, argv = command(root)
        warm = {root / "new": root / f"warm_{number}", root / "new.safetensors": root / f"warm_{number}.safetensors"}
        argv = [warm.get(word, word) for word in argv]
        assert main(list(map(str, argv))) in (0, None)
    return root


@dataclass
class Report:
    """What became of the cases of a group."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)
    slowest: float = 0.0

    def add(self, ended: Ended, fault: str | None, about: str) -> None:
        self.slowest = max(self.slowest, ended.seconds)
        self.counts["fault" if fault else "works" if ended.code == 0 else "refused"] += 1
        if fault:
            self.faults.setdefault(fault, []).append(about)

    def line(self, name: str) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        return f"{name}: {self.counts.total()} cases, {counts}; the slowest took {self.slowest:.1f} s"


def fault_of(ended: Ended, case: Path, before: set[str]) -> str | None:
    """Return what is wrong with the end of a command; None where it worked or was refused as it should be."""
    if ended.code is None:
        return "hang"
    if (case.parent / "bomb").exists():
        return "a pickle was opened"
    if "Traceback (most recent call last)" in ended.err:
        lines = ended.err.strip().splitlines()
        places = re.findall(r'File ".*?/(wandistiller/\S+|\w+\.py)", line (\d+)', ended.err)
        return f"traceback: {lines[-1][:160]} at {':'.join(places[-1]) if places else '?'}"
    if written := set(os.listdir(case)) - before - {"new", "new.safetensors", "cache", "run"}:
        return f"wrote {sorted(written)}"
    if ended.code == 2:
        messages = [line for line in ended.err.splitlines() if "error: " in line]
        if len(messages) != 1:
            return f"{len(messages)} messages"
        if len(messages[0].replace(str(case), "")) > LONGEST_MESSAGE:
            return f"a message of {len(messages[0])} letters: {messages[0].replace(str(case), '')[:120]}"
        # A run may find damage only when it reads an answer, and then has written what it did until then.
        if (case / "new.safetensors").exists():
            return "refused, and a file is left"
        left = [name for name in ("new", "cache", "run") if name not in before and (case / name).exists()]
        empty = [name for name in left if name == "new" or not any((case / name).iterdir())]
        return f"refused, and {empty[0]} is left" if empty else None
    return None if ended.code == 0 else f"exit code {ended.code}: {ended.err[-200:]}"


def run_case(group: Group, house: Path, folder: Path, damage: Damage) -> tuple[Ended, str | None, str]:
    shutil.rmtree(folder, ignore_errors=True)
    case = folder / "case"
    case.mkdir(parents=True)
    for part in group.parts:
        source = house / part
        shutil.copytree(source, case / part) if source.is_dir() else shutil.copy(source, case / part)
    files = sorted(file for pattern in group.files for file in case.glob(pattern) if file.is_file())
    damaged = apply(damage, files, folder / "bomb")
    before = set(os.listdir(case))
    main, argv = group.command(case)
    ended = run_forked(main, argv, folder)
    return ended, fault_of(ended, case, before), f"{damaged.relative_to(case)}: {damage}"


def fuzz(name: str, count: int, house: Path, folder: Path) -> None:
    group, report = (GROUPS | RUN_GROUPS)[name], Report()

    @seed(0)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(group.kinds))
    def every_case(damage: Damage) -> None:
        report.add(*run_case(group, house, folder, damage))

    every_case()
    print("\n" + report.line(name))
    lines = [f"{len(cases)} x {fault}; first: {cases[0]}" for fault, cases in report.faults.items()]
    assert not lines, "\n".join([report.line(name), *lines])


@pytest.mark.parametrize("name", [*GROUPS, *RUN_GROUPS])
def test_damaged_files_are_read_or_refused(house, tmp_path, name):
    fuzz(name, (GROUPS | RUN_GROUPS)[name].few, house, tmp_path / "fuzz")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GROUPS, *RUN_GROUPS])
def test_thousands_of_damaged_files_are_read_or_refused(house, tmp_path, name):
    fuzz(name, (GROUPS | RUN_GROUPS)[name].many, house, tmp_path / "fuzz")


FLAG_WORDS = st.one_of(
    st.sampled_from(
        ["--seed", "--batch_size", "--height", "--dtype", "--student", "--prompt", "--", "-1", "--seed=", "--x=1"]
    ),
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
)


def test_any_words_as_flags_are_answered(tmp_path):
    """The words are those of no command, so that nothing is drawn."""

    @seed(0)
    @settings(max_examples=60, phases=[Phase.generate], database=None, deadline=None)
    @given(st.lists(FLAG_WORDS, max_size=5))
    def every_case(words: list[str]) -> None:
        words = [word.replace("\0", "") for word in words]
        ended = run_forked(generate_images.main, ["--student", tmp_path / "none", *words], tmp_path)
        assert ended.code in (0, 2) and "Traceback" not in ended.err, (words, ended)
        assert ended.code == 0 or len(ended.err) < LONGEST_MESSAGE + len(str(tmp_path)), (words, ended.err)

    every_case()
