"""The teacher's answers on disk are built once, survive a stop anywhere, and teach without a teacher in memory.

Builds are stopped, killed inside a write and resumed, and must end bit for bit as those that never were. Answers to
something else, damaged files and small disks are refused.

pytest tests/targets/test_cache.py
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter, namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import wandistiller.targets.cache as cache_module
from support.caches import BATCH_SIZE, CONFIG, OPTIONS, PROMPTS, contents, make_answers, make_description
from support.runs import at_most, snapshot
from wandistiller.errors import UserError
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.cache import CachedAnswers, TeacherCache, teacher_fingerprint
from wandistiller.targets.cache_shards import AnswerError
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import StatesOptions
from wandistiller.wan.layouts import open_teacher, open_wan_files
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

NUM_BATCHES = 2 * cache_module.SHARD_BATCHES + 5


def cached_answers(cache: TeacherCache, batch_size: int = BATCH_SIZE, seed: int = 0) -> CachedAnswers:
    embeds = mock_prompt_embeds(PROMPTS, CONFIG.text_encoder_output_dim)
    return CachedAnswers(cache, embeds, Lanes(batch_size), "cpu", seed)


def build(folder, on_progress=lambda done: None, options: StatesOptions = OPTIONS) -> TeacherCache:
    cache = TeacherCache(folder, make_description(options))
    cache.build(make_answers(options), NUM_BATCHES, on_progress)
    return cache


def build_until(folder, stop_at: int, options: StatesOptions = OPTIONS) -> None:
    """A build that is stopped while it tells of batch `stop_at`."""

    def stop(done):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, stop, options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A complete cache: its folder, to be read only."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    build(folder)
    return folder


@pytest.fixture
def own(built, tmp_path):
    """A complete cache to break."""
    return shutil.copytree(built, tmp_path / "own")


# ---- what is in it ----


def test_a_cache_holds_what_the_teacher_answers_and_gives_every_answer_once_an_epoch(built):
    answers, expected = make_answers(), {}
    for _ in range(NUM_BATCHES):
        answer = answers.next()
        answers.advance(answer, answer.velocity, 0.0)
        for row, prompt in enumerate(answer.prompts):
            values = answer.latents[row], answer.velocity[row]
            expected[answer.sigma[row].item(), prompt, round(values[0].sum().item(), 1)] = values
    cache = TeacherCache(built, make_description())
    assert cache.is_complete and cache.num_answers == NUM_BATCHES * BATCH_SIZE
    cached, seen = cached_answers(cache, seed=1), Counter()
    for _ in range(2 * NUM_BATCHES):
        answer = cached.next()
        assert len(answer.prompts) == BATCH_SIZE and answer.latents.dtype == answer.sigma.dtype == torch.float32
        for row, prompt in enumerate(answer.prompts):
            close = [
                key
                for key in expected
                if key[:2] == (answer.sigma[row].item(), prompt)
                and torch.allclose(answer.latents[row], expected[key][0], rtol=1e-3, atol=1e-3)
            ]
            assert len(close) == 1
            torch.testing.assert_close(answer.velocity[row], expected[close[0]][1], rtol=1e-3, atol=1e-3)
            seen[close[0]] += 1
    assert set(seen.values()) == {2} and len(seen) == NUM_BATCHES * BATCH_SIZE and cached.num_calls == 0


def test_the_order_differs_from_epoch_to_epoch_and_goes_on_bit_for_bit_from_a_saved_state(built):
    cache = TeacherCache(built, make_description())
    one, other = cached_answers(cache, 4, seed=1), cached_answers(cache, 4, seed=2)
    rows = cached_answers(cache, 1, seed=1)
    epochs = [tuple(rows.next().latents.sum().item() for _ in range(cache.num_answers)) for _ in range(3)]
    assert len(set(epochs)) == 3 and len(set(map(frozenset, epochs))) == 1
    for _ in range(30):  # into the second epoch
        one.next()
    other.load_state_dict(one.state_dict())
    for _ in range(60):
        left, right = one.next(), other.next()
        assert torch.equal(left.latents, right.latents) and torch.equal(left.sigma, right.sigma)
        assert left.prompts == right.prompts


@pytest.mark.parametrize("options", [StatesOptions(kind="noise", seed=5), replace(OPTIONS, renoise_fraction=0.5)])
def test_uneven_batches_and_renoised_states_are_kept_to_the_bit_whether_stopped_or_not(tmp_path, options):
    build_until(tmp_path, cache_module.SHARD_BATCHES + 4, options)
    cache = build(tmp_path, options=options)
    answers, batches = make_answers(options), []
    for _ in range(NUM_BATCHES):
        batches.append(answers.next())
        answers.advance(batches[-1], batches[-1].velocity, 0.0)
    sizes = {len(batch.prompts) for batch in batches}
    assert sizes == ({1, 3} if options.kind == "noise" else {3})  # 7 prompts in threes leave one
    stored = [load_file(path) for path in sorted(tmp_path.glob("answers_*.safetensors"))]
    for name, expected in {
        "latents": torch.cat([batch.latents for batch in batches]).half(),
        "velocity": torch.cat([batch.velocity for batch in batches]).half(),
        "sigma": torch.cat([batch.sigma for batch in batches]),
        "prompts": torch.tensor([prompt for batch in batches for prompt in batch.prompts]),
    }.items():
        found = torch.cat([shard[name] for shard in stored])
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert cache.num_answers == TeacherCache(tmp_path, make_description(options)).num_answers == len(expected)


def test_a_batch_larger_than_the_cache_is_the_whole_cache(built):
    cache = TeacherCache(built, make_description())
    answer = cached_answers(cache, 1000).next()
    assert len(answer.latents) == len(answer.sigma) == len(answer.prompts) == cache.num_answers


def test_a_teacher_is_known_by_its_weights_wherever_it_lies(tmp_path):
    mock = open_teacher("mock", CONFIG).expert("high")
    weights = {name: mock.read(name) for name in mock.names()}

    def fingerprint(name: str, weights: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_heads": mock.config.num_heads}))
        save_file(weights, tmp_path / name / "diffusion_pytorch_model.safetensors")
        return teacher_fingerprint(open_wan_files(tmp_path / name))

    here = fingerprint("here", weights)
    assert fingerprint("elsewhere", weights) == here
    for number, name in enumerate(weights):
        assert fingerprint(f"another {number}", weights | {name: weights[name] + 0.01}) != here, name


# ---- stopped and gone on ----


@pytest.mark.parametrize("stop_at", [1, cache_module.SHARD_BATCHES + 1, NUM_BATCHES])
def test_a_stopped_build_goes_on_and_ends_as_one_never_stopped(built, tmp_path, stop_at):
    build_until(tmp_path / "cache", stop_at)
    assert not TeacherCache(tmp_path / "cache", make_description()).is_complete
    asked = []
    build(tmp_path / "cache", asked.append)
    assert asked[0] == (stop_at - 1) // cache_module.SHARD_BATCHES * cache_module.SHARD_BATCHES + 1
    assert contents(tmp_path / "cache") == contents(built)


@pytest.mark.parametrize("seconds", [0.02, 0.15, 0.4])
def test_a_killed_build_goes_on_and_ends_as_one_never_stopped(built, tmp_path, seconds):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=build, args=(tmp_path / "cache", lambda done: started.set()))
    process.start()
    assert started.wait(60)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    build(tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(built)


@pytest.mark.parametrize("name", ["cache.json", "answers_00001.safetensors", "state.safetensors"])
def test_what_a_kill_inside_a_write_leaves_is_no_hindrance_and_is_removed(built, tmp_path, name, monkeypatch):
    """The process dies where atomic_path would rename; with cache.json that is before there is any other file."""

    class Killed(BaseException):
        pass

    def die(source, target):
        if target.name == name:
            raise Killed
        return replace_file(source, target)

    replace_file, unlink = os.replace, cache_module.Path.unlink
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", die)
        patch.setattr(cache_module.Path, "unlink", lambda path, missing_ok=False: None)  # the dead tidy nothing
        build(tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".tmp")]
    assert cache_module.Path.unlink is unlink
    build(tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(built)


def test_a_complete_cache_is_never_written_again(own):
    before = snapshot(own)
    build(own, lambda done: pytest.fail("the teacher was asked"))
    assert snapshot(own) == before


@pytest.mark.parametrize("name", ["answers_00000.safetensors", "state.safetensors"])
def test_what_a_stopped_build_left_is_checked_before_the_teacher_is_asked(tmp_path, name):
    build_until(tmp_path / "cache", NUM_BATCHES)
    (tmp_path / "cache" / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{name}: is missing or damaged.*remove"):
        build(tmp_path / "cache", lambda done: pytest.fail("the teacher was asked"))


# ---- refused ----


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"guidance_scale": 5.0}, ["guidance_scale 3.0", "5.0"]),
        ({"shift": 7.0}, ["shift 3.0", "7.0"]),
        ({"negative_prompt": "blurry"}, ["negative_prompt", "'blurry'"]),
        ({"prompts": PROMPTS[:5]}, ["num_prompts 7", "5", "prompts '"]),
        ({"options": replace(OPTIONS, kind="renoise", renoise_fraction=0.5)}, ["'trajectory'", "'renoise'", "0.5"]),
        ({"options": replace(OPTIONS, seed=6)}, ["states_seed 5", "6"]),
    ],
)
def test_answers_to_something_else_are_refused_with_both_values(built, changes, words):
    before = contents(built)
    with pytest.raises(UserError) as error:
        TeacherCache(built, make_description(**changes))
    assert all(word in str(error.value) for word in [str(built), *words])
    assert contents(built) == before


def test_another_teacher_of_the_same_shape_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="teacher '"):
        TeacherCache(built, make_description() | {"teacher": "0123"})


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="not a teacher cache"):
        TeacherCache(tmp_path, make_description())
    assert contents(tmp_path) == {"holiday.jpg": b"mine"}


def rewrite(shard, **changes) -> None:
    """Replace tensors of a shard; None leaves one out."""
    tensors = load_file(shard) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, shard)


DAMAGE = {
    "cut": lambda shard: shard.write_bytes(shard.read_bytes()[:-100]),
    "gone": lambda shard: shard.unlink(),
    "no velocity": lambda shard: rewrite(shard, velocity=None),
    "fewer latents than answers": lambda shard: rewrite(shard, latents=load_file(shard)["latents"][:5].clone()),
    "another's, with fewer answers": lambda shard: shutil.copy(shard.with_name("answers_00002.safetensors"), shard),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named(own, damage):
    damage(own / "answers_00001.safetensors")
    with pytest.raises(UserError, match=r"answers_00001\.safetensors: is missing or damaged.*remove"):
        TeacherCache(own, make_description())


@pytest.mark.parametrize(
    "text",
    [
        '{"is_complete": true',
        "[]",
        '{"is_complete": true, "answers_of": 1, "rows": [1]}',
        '{"is_complete": true, "answers_of": {}, "num_shards": 0}',
        '{"is_complete": true, "answers_of": {}, "num_shards": 1e999}',
        "[" * 100_000,
    ],
    ids=["cut", "list", "of a number", "no shard", "no number of shards", "nested"],
)
def test_a_damaged_description_is_named(own, text):
    (own / "cache.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"cache\.json: is damaged.*remove"):
        TeacherCache(own, make_description())


def test_a_cache_that_says_only_how_many_shards_it_has_is_read_all_the_same(own):
    about = json.loads((own / "cache.json").read_text(encoding="utf-8"))
    del about["rows"]
    (own / "cache.json").write_text(json.dumps(about), encoding="utf-8")
    assert TeacherCache(own, make_description()).num_answers == NUM_BATCHES * BATCH_SIZE


def flip(shard, name: str) -> None:
    """Change one bit of the last value of a tensor where it lies in the file."""
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    end = json.loads(content[8 : 8 + length])[name]["data_offsets"][1]
    content[8 + length + end - 1] ^= 1
    shard.write_bytes(content)


def relabel(shard) -> None:
    """Call the bytes of the velocities another type of the same size."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["velocity"]["dtype"] = "BF16"
    shard.write_bytes(
        content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]
    )


def learn_an_epoch(cache: TeacherCache) -> None:
    answers = cached_answers(cache)
    for _ in range(NUM_BATCHES):
        answers.next()


@pytest.mark.parametrize("name", ["latents", "velocity", "sigma", "prompts", "checksums"])
def test_a_flipped_bit_is_never_learnt_from(own, name):
    learn_an_epoch(TeacherCache(own, make_description()))
    flip(own / "answers_00001.safetensors", name)
    with pytest.raises(UserError, match=r"answers_00001\.safetensors: is missing or damaged.*answer 47.*remove"):
        learn_an_epoch(TeacherCache(own, make_description()))


def test_answers_of_another_type_than_was_written_are_refused(own):
    relabel(own / "answers_00001.safetensors")
    with pytest.raises(UserError, match=r"answers_00001\.safetensors: is missing or damaged.*BF16"):
        TeacherCache(own, make_description())


def test_a_cache_of_a_version_without_checksums_is_read_with_a_warning_and_still_checked(own, capsys):
    for shard in own.glob("answers_*"):
        rewrite(shard, checksums=None)
    cache = TeacherCache(own, make_description())
    assert "without checksums" in capsys.readouterr().out
    learn_an_epoch(cache)
    shard = own / "answers_00001.safetensors"
    for changes in ({"velocity": torch.nan}, {"sigma": 1.5}, {"prompts": len(PROMPTS)}):
        tensors = load_file(shard)
        ((name, value),) = changes.items()
        rewrite(shard, **{name: torch.full_like(tensors[name], value)})
        with pytest.raises(UserError, match=r"answers_00001\.safetensors: is missing or damaged.*remove"):
            learn_an_epoch(TeacherCache(own, make_description()))
        save_file(tensors, shard)


@pytest.mark.parametrize(
    "changes", [{"states.lanes.latents": None}, {"num_calls": None}, {"states.position": torch.tensor(-1)}]
)
def test_a_state_of_a_build_that_is_none_is_refused_before_the_teacher_is_asked(tmp_path, changes):
    build_until(tmp_path / "cache", NUM_BATCHES)
    rewrite(tmp_path / "cache" / "state.safetensors", checksums=None, **changes)
    with pytest.raises(UserError, match=r"state\.safetensors: is missing or damaged.*remove"):
        build(tmp_path / "cache", lambda done: pytest.fail("the teacher was asked"))


def test_a_flipped_bit_in_the_state_of_a_build_is_found_before_the_teacher_is_asked(tmp_path):
    build_until(tmp_path / "cache", NUM_BATCHES)
    flip(tmp_path / "cache" / "state.safetensors", "states.lanes.latents")
    with pytest.raises(UserError, match=r"state\.safetensors: is missing or damaged.*checksum.*remove"):
        build(tmp_path / "cache", lambda done: pytest.fail("the teacher was asked"))


@pytest.mark.parametrize("name", ["cache.json", "answers_00001.safetensors"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(own, name):
    (own / name).unlink()
    os.mkfifo(own / name)
    with at_most(20), pytest.raises(UserError, match=rf"{name}: is (missing or )?damaged.*remove"):
        TeacherCache(own, make_description())


def test_a_run_does_not_go_on_in_a_cache_of_another_size(built, tmp_path):
    cache = TeacherCache(tmp_path / "shorter", make_description())
    cache.build(make_answers(), 10, lambda done: None)
    state = cached_answers(cache).state_dict()
    longer = cached_answers(TeacherCache(built, make_description()))
    with pytest.raises(UserError, match=f"{NUM_BATCHES * BATCH_SIZE} answers.* 30;.*--overwrite"):
        longer.load_state_dict(state)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"--teacher_cache.*is a file"):
        TeacherCache(tmp_path / "file" / "cache", make_description())


def set_free_bytes(monkeypatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))


def test_a_disk_too_small_is_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    set_free_bytes(monkeypatch, 10_000)
    with pytest.raises(UserError, match="10,000 are free"):
        build(tmp_path / "cache", lambda done: pytest.fail("the teacher was asked"))


def test_a_stopped_build_needs_room_for_the_rest_only(built, tmp_path, monkeypatch):
    build_until(tmp_path / "cache", NUM_BATCHES)
    state_bytes = (tmp_path / "cache" / "state.safetensors").stat().st_size
    last_shard = (built / "answers_00002.safetensors").stat().st_size
    set_free_bytes(monkeypatch, last_shard // 2 + state_bytes)
    with pytest.raises(UserError, match=f"{NUM_BATCHES % cache_module.SHARD_BATCHES} batches"):
        build(tmp_path / "cache")
    set_free_bytes(monkeypatch, last_shard + state_bytes)
    build(tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(built)


def test_the_room_for_renoised_samples_counts_too(tmp_path, monkeypatch):
    """They are kept in float32 beside the answers, here more bytes than the answers have."""
    options = replace(OPTIONS, renoise_fraction=0.5)
    set_free_bytes(monkeypatch, 2 * sum(path.stat().st_size for path in build(tmp_path / "a", options=options).shards))
    with pytest.raises(UserError, match="are free"):
        build(tmp_path / "b", options=options)


@pytest.mark.parametrize(
    "factor, words", [(1e6, "more than torch.float16 holds.*--guidance_scale"), (torch.nan, "not finite")]
)
def test_a_velocity_that_cannot_be_stored_stops_the_build(tmp_path, monkeypatch, factor, words):
    monkeypatch.setattr(Teacher, "_guided", lambda self, name, latents, *rest: (latents * factor, ()))
    with pytest.raises(AnswerError, match=f"batch 1: .*{words}") as error:
        build(tmp_path / "cache")
    assert error.value.exit_code == 1
    assert not json.loads((tmp_path / "cache" / "cache.json").read_text(encoding="utf-8"))["is_complete"]
