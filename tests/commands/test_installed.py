"""`pip install .` puts one command on the PATH that is every command of the root, with no clone around it.

A wheel is built and installed in a fresh environment, where pip's own script starts it from an empty folder; it sees the
libraries of this interpreter. The wheel's modules are held against the folders of the repository.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import wandistiller
from support.runs import ROOT
from wandistiller.__main__ import ABOUT, main
from wandistiller.command_line import COMMANDS

SCRIPTS = {script: name for name, script in COMMANDS.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source, built without a network from a copy that git would check out."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("wandistiller", "config", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    for script in ROOT.glob("*.py"):
        (source / script.name).symlink_to(script)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, source]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "No module named pip" in run.stderr or "No module named 'setuptools'" in run.stderr:
        pytest.skip("pip and setuptools build the wheel, and one of them is not here")
    assert run.returncode == 0, run.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installation(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel in it: the path of its `wandistiller`."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    libraries = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--no-deps", "-q", wheel]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return place / "bin" / "wandistiller"


@pytest.fixture
def installed(installation, tmp_path):
    """Run the installed command in an empty folder, and return what a person sees."""

    def run(*words: object) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(installation), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)

    return run


def test_the_wheel_holds_every_package_command_page_and_ready_config(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in file.namelist() if name.endswith("METADATA"))
        assert f"Version: {wandistiller.__version__}\n" in file.read(metadata).decode()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "wandistiller").rglob("*.py")}
    expected |= {path.name for path in ROOT.glob("*.py")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "wandistiller" / "reports" / "page").iterdir()}
    assert {name.rsplit(".", 1)[1] for name in pages} >= {"html", "css", "md"}
    workflows = (ROOT / "wandistiller" / "projection").glob("*.json")
    expected |= pages | {str(path.relative_to(ROOT)) for path in workflows}
    configs = [path.relative_to(ROOT / "config") for path in (ROOT / "config").rglob("*.*")]
    assert held == expected | {f"wandistiller/ready_configs/{path}" for path in configs}


def test_the_installed_command_works_where_no_clone_is(installed, tmp_path):
    """A plan and a mistake are told as of the command that was typed; configs and presets come from what was installed."""
    outcome = installed("--help")
    assert outcome.returncode == 0 and all(f"\n  {name} " in outcome.stdout for name in COMMANDS)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    outcome = installed("train")
    assert outcome.returncode == 2 and "lies in a clone of WanDistiller" in outcome.stderr
    assert all(flag in outcome.stderr for flag in ("--teacher_path", "--data_path"))
    outcome = installed("train", "--preset", "1.3B-0.5B", "--teacher_path", "mock", "--data_path", "prompts.txt", "--dry_run",
                        "--eval_prompts", "prompts.txt", "--save_every", 0)  # fmt: skip
    assert outcome.returncode == 0 and "hidden_size 1280" in outcome.stdout and "GiB" in outcome.stdout, outcome.stderr
    assert installed("train", "--no_such_flag").stderr.startswith("wandistiller train: error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt"}


def test_every_script_of_the_root_is_a_command_with_its_own_function():
    assert {path.name for path in ROOT.glob("*.py")} <= set(SCRIPTS) and COMMANDS.keys() == ABOUT.keys()


@pytest.mark.parametrize("name", [name for name, script in COMMANDS.items() if (ROOT / script).is_file()])
def test_each_command_has_a_version(run_main, name):
    outcome = run_main(main, name, "--version")
    assert (outcome.code, outcome.out) == (0, f"WanDistiller {wandistiller.__version__}\n")


def test_a_command_that_is_not_there_is_one_sentence(run_main):
    run_main(main, "trian").refused("'trian' is no command of wandistiller; allowed: train, project")
    assert run_main(main).code == 2
