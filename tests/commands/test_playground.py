"""playground.py serves one page, which draws what generate_images.py draws; Gradio's own client is the browser."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate_images
import playground
from support.runs import ROOT
from support.students import train_student, write_teacher

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason='Gradio is not installed: pip install ".[playground]"'
)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("playground")
    write_teacher(root / "teacher", seed=5)
    train_student(root, root / "teacher", "--guidance_scale", "3", "--num_samples", "0")
    return root


@pytest.fixture(scope="module")
def url(house):
    """The address of a playground that runs as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", ROOT / "playground.py", "--student", house / "student", "--port", str(port)]
    command += ["--prompt_cache", house / "cache", "--device", "cpu"]
    # Telemetry is off even where somebody's settings ask for it:
    settings = os.environ | {"GRADIO_ANALYTICS_ENABLED": "True", "TMPDIR": str(house)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings, cwd=house
    ) as process:
        try:
            said = process.stdout.readline()
            assert f"Open http://127.0.0.1:{port}/" in said, said + process.stdout.read()
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and "Traceback" not in rest, rest
    assert not list(house.glob("playground-*")), "its scratch folder is removed"


def test_the_page_draws_what_the_command_draws_and_answers_mistakes_in_a_sentence(url, house, tmp_path, run_main):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False, download_files=str(tmp_path))
    student, teacher = client.predict("a red circle", 3, 32, 32, True, api_name="/draw")
    for who, file in (("student", student), ("teacher", teacher)):
        words = ["--student", house / "student", "--prompt_cache", house / "cache", "--device", "cpu", "--model", who]
        words += ["--prompt", "a red circle", "--seed", 3, "--output", tmp_path / who]
        run_main(generate_images.main, *words).ok()
        own = np.asarray(Image.open(tmp_path / who / "000_a-red-circle_seed3_32x32.png")).astype(int)
        assert np.abs(own - np.asarray(Image.open(file))[..., :3]).max() <= 1
    assert client.predict("a red circle", 3, 48, 32, False, api_name="/draw")[1] is None
    for asked, words in (
        (("a red circle", 0, 40, 32, False), "width 40 is not a multiple of 16"),
        ((" ", 0, 32, 32, False), "the prompt is"),
        (("a", -1, 32, 32, False), "seed is -1"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(*asked, api_name="/draw")


def test_it_listens_on_this_machine_alone_and_sends_nothing_out(url):
    config = json.load(urllib.request.urlopen(f"{url}config", timeout=20))
    assert config["analytics_enabled"] is False
    assert not [sheet for sheet in config["stylesheets"] if "://" in sheet], "no fonts of other servers"
    with pytest.raises(OSError):  # another address of this machine, which a server on all addresses would answer at
        socket.create_connection(("127.0.0.2", int(url.rsplit(":", 1)[1].strip("/"))), timeout=5)


@pytest.mark.parametrize(
    ("path", "origin", "status"),
    [
        ("config", None, 200),
        ("config", "own", 200),
        ("config", "http://attacker.example", 403),
        ("config", "null", 403),
        ("gradio_api/upload", None, 403),
        ("gradio_api/upload", "own", 403),
    ],
)
def test_it_answers_its_own_page_alone_and_takes_no_upload(url, path, origin, status):
    form = b'--xx\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n--xx--\r\n'
    headers = {} if origin is None else {"Origin": url.rstrip("/") if origin == "own" else origin}
    upload = {"data": form, "method": "POST"} if "upload" in path else {}
    headers |= {"Content-Type": "multipart/form-data; boundary=xx"} if upload else {}
    try:
        found = urllib.request.urlopen(urllib.request.Request(url + path, headers=headers, **upload), timeout=20).status
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == status


def test_a_host_that_is_not_this_machine_is_refused(url):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(f"{url}config", headers={"Host": "attacker.example"}), timeout=20)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--student", ".", "student_config.json"), ("--port", 0, "--port"), ("--outputs", "nowhere", "--student")],
)
def test_mistakes_in_flags_are_answered_in_one_line(run_main, tmp_path, monkeypatch, flag, value, words):
    monkeypatch.chdir(tmp_path)
    run_main(playground.main, flag, value).refused(words)
