"""No command opens a connection or looks up a name, as long as no hub id and no tracker is named.

The commands run in a fresh process without the variables that keep libraries offline; Python's own audit hooks, which see every
connection of every library, are the oracle.
"""

import json
import os
import subprocess
import sys

from support.runs import PRUNED_CONFIG, ROOT

WATCHED = """
import json, runpy, sys

log = open(sys.argv[1], "a")

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        log.write(f"{event} {arguments[-2:]!r}\\n")
        log.flush()

sys.addaudithook(hook)
sys.path.insert(0, sys.argv[2])
from wandistiller.command_line import run_command

for module, argv in json.loads(sys.argv[3]):
    main = __import__(module).main
    assert run_command(lambda: main(argv)) == 0, module
"""


def test_training_drawing_measuring_and_exporting_open_no_connection(teachers, write_config, tmp_path):
    folder, log = tmp_path / "student", tmp_path / "log.txt"
    cache = ["--prompt_cache", tmp_path / "cache", "--device", "cpu"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    commands = [
        ("train_distillation", ["--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG),
            "--data_path", prompts, "--output_dir", folder, "--max_steps", 2, "--num_samples", 1, "--sample_every", 1, *cache]),
        ("generate_images", ["--student", folder, "--prompt", "a red circle", "--output", tmp_path / "drawn", *cache]),
        ("evaluate_student", ["--student", folder, "--prompts_file", prompts, "--num_seeds", 1, "--frontier_prompts", 0, *cache]),
        ("export_student", ["--student", folder, "--format", "pipeline", "--output", tmp_path / "pipeline"]),
    ]  # fmt: skip
    told = json.dumps([(module, [str(word) for word in argv]) for module, argv in commands])
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, log, ROOT, told], env=online, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert log.read_text() == ""
