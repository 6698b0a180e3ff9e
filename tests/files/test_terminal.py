"""What a file holds never commands the terminal: names and texts of strangers come out spelt, in messages and in what is printed."""

import subprocess
import sys
from pathlib import Path

from wandistiller.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_control_characters_are_spelt_on_both_streams_and_in_messages():
    text = "\x1b]0;owned\x07 \x1b[2J \x9b2J \x7f \x08\x08 \u202egnp.exe a\x0bb"
    code = (
        "import sys; from wandistiller.command_line import run_command; from wandistiller.errors import UserError\n"
        "def main():\n"
        "    text = sys.argv[1]; print('one', text); print(text, file=sys.stderr); sys.stdout.writelines([text, chr(10)])\n"
        "    raise UserError(f'{text}: is no file\\rDone.')\n"
        "sys.exit(run_command(main))"
    )
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, cwd=ROOT)
    shown = (done.stdout + done.stderr).decode()
    spelt = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    assert done.returncode == 2 and shown.count(spelt) == 4
    assert all(letter.isprintable() or letter == "\n" for letter in shown), repr(shown)
    assert spelt in str(UserError(text))


def test_bars_still_move():
    code = (
        "import sys; from wandistiller.command_line import run_command\n"
        "def main():\n"
        "    from tqdm import tqdm\n"
        "    for _ in tqdm(range(2), position=1): pass\n"
        "run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert b"\r" in done.stderr and b"\x1b[A" in done.stderr
