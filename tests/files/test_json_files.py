"""Whatever a JSON file holds, it is read or refused for one short reason, at once."""

import os

import pytest

from wandistiller.files.json_files import MAX_BYTES, JsonError, load_json, parse_json

UNUSABLE = {
    "a missing bracket": ('{"a": 1,\n "b": ', "line 2, column 7: not valid JSON"),
    "nothing": ("", "line 1, column 1"),
    "brackets beyond Python's stack": ("[" * 100_000, "nested more than 100"),
    "brackets that Python parses, but not what comes later": ("[" * 500 + "]" * 500, "nested more than 100"),
    "objects in objects": ('{"a":' * 300 + "1" + "}" * 300, "nested more than 100"),
    "digits without end": ("1" * 5000, "limit"),
    "half a letter": ('{"a": ["\\ud800"]}', "surrogate"),
    "half a letter in a key": ('{"\\udfff": 1}', "surrogate"),
}


@pytest.mark.parametrize("text, words", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_text_is_refused_for_a_short_reason(text, words):
    with pytest.raises(JsonError, match=words) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_whole_letters_spelt_as_pairs_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"\\ud83d\\ude00": [1, null]}')
    assert load_json(tmp_path / "a.json") == {"\N{GRINNING FACE}": [1, None]}


def test_what_is_no_text_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(MAX_BYTES * 200)
    reasons = {
        "pipe": "pipe or a device",
        ".": "directory",
        "bytes": "UTF-8",
        "nowhere": "No such file",
        "loop": "symbolic links",
        "sparse": "is larger than",
    }
    for name, reason in reasons.items():
        with pytest.raises(JsonError, match=reason):
            load_json(tmp_path / name)
