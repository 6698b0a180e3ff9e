"""docs/python.md is one notebook: its blocks run one after the other, and every command takes the student that they make.

pytest tests/commands/test_python_page.py
"""

import json
import os
import re
import subprocess
import sys

import export_student
import generate_images
from support.runs import ROOT
from wandistiller import StudentConfig

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_blocks_of_the_page_run_and_every_command_takes_the_student(run_main, tmp_path):
    for name in ("data", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)))
    ran = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    student = tmp_path / "outputs" / "mine"
    record = StudentConfig.load(student).distillation
    assert record["num_train_steps"] == 50 and "student_steps" not in record
    results = json.loads((student / "evaluation.json").read_text(encoding="utf-8"))
    assert results["num_prompts"] == 2 and (student / "gallery.html").is_file()
    drawn = run_main(
        generate_images.main, "--student", student, "--prompt", "a red circle", "--output", tmp_path / "drawn",
        "--prompt_cache", tmp_path / "outputs" / "prompt_cache", "--num_inference_steps", 2,
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    exported = run_main(
        export_student.main, "--student", student, "--format", "original", "--output", tmp_path / "mine.safetensors"
    )
    assert exported.code == 0, exported.err
