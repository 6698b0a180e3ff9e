"""playground.py is used as a person would use it, in the distribution's Chromium driven by Playwright.

One server runs for all tests, of a tiny student; without Gradio, Playwright or Chromium they are skipped. No request may leave
this machine, and no file may be served.

pytest tests/commands/test_playground.py
"""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import playground
from support.runs import ROOT
from support.students import train_student, write_teacher

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason='Gradio is not installed: pip install ".[playground]"'
)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("playground")
    write_teacher(root / "teacher", seed=5)
    train_student(root / "outputs", root / "teacher", "--guidance_scale", "3", "--num_samples", "0")
    return root


@pytest.fixture(scope="module")
def url(house) -> Iterator[str]:
    """The address of a playground that runs as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", ROOT / "playground.py", "--outputs", house / "outputs", "--port", str(port)]
    command += ["--prompt_cache", house / "cache", "--device", "cpu"]
    # Telemetry is off even where somebody's settings ask for it, and a share link is not made:
    settings = os.environ | {"GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_SHARE": "True", "TMPDIR": str(house)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings, cwd=house
    ) as process:
        said = [process.stdout.readline(), process.stdout.readline()]
        try:
            assert f"Open http://127.0.0.1:{port}/" in said[-1], said + process.stdout.readlines()
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and "Traceback" not in rest, rest
    assert not list(house.glob("playground-*")), "its scratch folder is removed"


@pytest.fixture
def page(browser, url) -> Iterator:
    """A window of the playground, with what it requested in `page.requested`."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    window = context.new_page()
    window.requested = []
    window.on("request", lambda request: window.requested.append(request.url))
    window.goto(url)
    window.wait_for_function("document.querySelector('#width input')?.value === '32'")
    yield window
    context.close()


def draw(page, prompt: str, **numbers: int) -> None:
    page.fill("#prompt textarea", prompt)
    for name, value in numbers.items():
        page.fill(f"#{name} input", str(value))
    page.click("#draw")


def pictures(page, count: int, other_than: list[str] | None = None) -> list[str]:
    """The pictures on the page, once there are so many and they are others than those."""
    page.wait_for_function(
        "([count, before]) => { const now = [...document.querySelectorAll('#pictures img')].map((image) => image.src);"
        " return now.length === count && now.join() !== (before ?? []).join() }",
        arg=[count, other_than],
    )
    return [image.get_attribute("src") for image in page.locator("#pictures img").all()]


@needs_gradio
@pytest.mark.slow
def test_a_prompt_becomes_two_pictures_and_another_seed_two_others_and_nothing_leaves_this_machine(page, url):
    page.check("#teacher input")
    draw(page, "a red circle")
    first = pictures(page, 2)
    draw(page, "a red circle", seed=1)
    assert not set(first) & set(pictures(page, 2, first))
    assert page.locator("#pictures img").first.get_attribute("alt") == "teacher, seed 1: a red circle"
    assert {address.split("/")[2] for address in page.requested if address.startswith("http")} == {url.split("/")[2]}
    # Neither could the page load anything, if it wanted to:
    blocked = "() => fetch('https://example.com/').then(() => 'there', (error) => String(error))"
    assert "TypeError" in page.evaluate(blocked)


@needs_gradio
@pytest.mark.slow
def test_mistakes_are_sentences_on_the_page_and_what_was_typed_is_text(page):
    draw(page, "a red circle", width=40)
    page.wait_for_selector("#pictures [role=alert]")
    assert "idth 40 is not a multiple of 16 (VAE factor 8 x patch size 2); use 32 or 48" in page.inner_text("#pictures")
    draw(page, HOSTILE, width=48)
    pictures(page, 1)
    assert "trained at 32 x 32 pixels alone" in page.inner_text("#pictures [role=status]")
    assert page.title() == "WanDistiller playground"


@needs_gradio
@pytest.mark.slow
def test_a_download_is_a_png_that_tells_how_it_was_made(page):
    draw(page, "a red circle", seed=5)
    pictures(page, 1)
    with page.expect_download() as download:
        page.click("#pictures a[download]")
    assert download.value.suggested_filename == "a-red-circle_seed5_32x32_student.png"
    image = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert (image.info["prompt"], image.info["seed"], image.info["model"]) == ("a red circle", "5", "student")


# ---- without a browser ----


def answered(url: str, data: bytes | None = None, **headers: str) -> int:
    """The status that a request is answered with."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, named), timeout=20).status
    except urllib.error.HTTPError as refused:
        return refused.code


@needs_gradio
def test_what_the_page_asks_for_is_drawn(url):
    """The page's own two requests: an event joins the queue, and a stream brings its answer."""
    config = json.load(urllib.request.urlopen(f"{url}config", timeout=20))
    drawing = next(event["id"] for event in config["dependencies"] if len(event["inputs"]) == 8)
    asked = ["student", HOSTILE, 3, 2, None, 48, None, False]
    body = json.dumps({"data": asked, "fn_index": drawing, "session_hash": "test"}).encode()
    join = urllib.request.Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    assert urllib.request.urlopen(join, timeout=20).status == 200
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=test", timeout=60) as stream:
        told = (json.loads(line.removeprefix(b"data: ")) for line in stream if line.startswith(b"data: "))
        (html,) = next(event for event in told if event["msg"] == "process_completed")["output"]["data"]
    assert html.count("data:image/png") == 2 * 2 and "seed 4" in html  # each is shown, and linked for a download
    assert "trained at 32 x 32 pixels alone" in html and "<img src=x" not in html


@needs_gradio
def test_no_file_is_served_and_nothing_is_taken_in(url, house):
    secret = house / "outputs" / "student" / "student_config.json"
    (house / "secret.txt").write_text("secret", encoding="utf-8")
    for asked in ("/etc/passwd", secret, house / "secret.txt", "../../../../etc/passwd", ROOT / "README.md"):
        for way in ("file=", "gradio_api/file=", "gradio_api/file/", "static/", "assets/", "theme.css/../"):
            assert answered(f"{url}{way}{asked}") in (403, 404, 405), (way, asked)
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nbytes\r\n--x--\r\n'
    kind = "multipart/form-data; boundary=x"
    for headers in ({}, {"Origin": url.rstrip("/")}, {"Origin": "http://attacker.example"}):
        assert answered(f"{url}gradio_api/upload", form, Content_Type=kind, **headers) == 403
    (scratch,) = house.glob("playground-*")
    assert not [file for file in scratch.rglob("*") if file.is_file() and b"bytes" in file.read_bytes()]


@needs_gradio
def test_it_answers_its_own_page_alone(url):
    config = urllib.request.urlopen(f"{url}config", timeout=20)
    assert "default-src 'self'" in config.headers["content-security-policy"]
    assert b'"analytics_enabled":false' in config.read().replace(b" ", b"")
    assert answered(f"{url}config", Origin=url.rstrip("/")) == 200
    assert answered(f"{url}config", Origin="http://attacker.example") == 403
    assert answered(f"{url}config", Origin="null") == 403
    assert answered(f"{url}config", Host="attacker.example:7860") == 400, "a name that leads to this machine"
    with pytest.raises(OSError):  # another address of this machine, which a server on all addresses would answer at
        socket.create_connection(("127.0.0.2", int(url.rsplit(":", 1)[1].strip("/"))), timeout=5)


@needs_gradio
@pytest.mark.parametrize(
    ("flag", "value", "words"), [("--outputs", ".", "no folder of a trained student"), ("--port", 0, "--port")]
)
def test_mistakes_in_flags_are_answered_in_one_line(run_main, tmp_path, monkeypatch, flag, value, words):
    monkeypatch.chdir(tmp_path)
    outcome = run_main(playground.main, flag, value)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err
