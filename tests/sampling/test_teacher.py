"""The teacher's guided velocity is that of diffusers' 3D transformers, and each release has its own settings.

An offloaded teacher must answer bit for bit as one that stays. All of it runs on a CPU.
"""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.wan_folders import oracle_velocity, relative_error, write_pipeline_folder
from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig
from wandistiller.projection.project import project_experts
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.sampling.streaming import StreamedBlocks
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import RELEASED_LATENTS, resolve_settings
from wandistiller.wan.wan_files import WanFiles

NEGATIVE = torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
SIGMA = torch.tensor([0.1234, 0.8749, 0.875, 0.9876])  # two for either expert, one of them on the boundary


def batch():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 4, 6, generator=generator)
    return latents, SIGMA, torch.randn(4, 9, 20, generator=generator), torch.tensor([0, 3, 7, 9])


def make_teacher(folder, *, two_experts: bool, **settings):
    """A teacher over a tiny pipeline folder, and diffusers' own transformers."""
    transformers = write_pipeline_folder(folder, two_experts=two_experts, seed=3)
    wan_files = open_wan_files(folder)
    resolved = resolve_settings(wan_files, **settings)
    return Teacher(project_experts(wan_files, 512), resolved, NEGATIVE), transformers


def count_calls(teacher: Teacher) -> dict[str, list[int]]:
    """Rows that each expert answers in its forward calls, both halves of guidance counted, as they come."""
    calls: dict[str, list[int]] = {name: [] for name in teacher.experts}
    for name, expert in teacher.experts.items():
        expert.register_forward_hook(lambda _module, _args, output, name=name: calls[name].append(len(output)))
    return calls


def guided_by_hand(model, scale: float, latents, sigma, prompt_embeds, prompt_lengths):
    """v_uncond + g (v_cond - v_uncond), each half through diffusers' 3D model on its own."""
    timestep, size = 1000 * sigma, len(latents)
    cond = oracle_velocity(model, latents, timestep, prompt_embeds, prompt_lengths)
    negative, length = NEGATIVE.expand(size, -1, -1), torch.full((size,), len(NEGATIVE))
    uncond = oracle_velocity(model, latents, timestep, negative, length)
    return uncond + scale * (cond - uncond)


# ---- velocity ----


@pytest.mark.parametrize("scale", [0.0, 3.5, 7.0])
def test_guidance_is_that_of_diffusers_two_halves(tmp_path, scale):
    teacher, (transformer,) = make_teacher(tmp_path, two_experts=False, guidance_scale=scale)
    calls = count_calls(teacher)
    velocity = teacher.velocity(*batch())
    assert relative_error(velocity, guided_by_hand(transformer, scale, *batch())) <= 1e-5
    assert calls == {"high": [8]}


def test_a_guidance_scale_of_one_costs_one_half_and_needs_no_negative_prompt(tmp_path):
    made, (transformer,) = make_teacher(tmp_path, two_experts=False, guidance_scale=1.0)
    assert not made.settings.uses_guidance
    teacher = Teacher(made.experts, made.settings, None)
    calls = count_calls(teacher)
    latents, sigma, prompt_embeds, lengths = batch()
    expected = oracle_velocity(transformer, latents, 1000 * sigma, prompt_embeds, lengths)
    assert relative_error(teacher.velocity(*batch()), expected) <= 1e-5
    assert calls == {"high": [4]}


def test_each_sample_goes_to_the_expert_of_its_own_noise_level(tmp_path):
    scales = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    teacher, (high, low) = make_teacher(tmp_path, two_experts=True, **scales)
    calls = count_calls(teacher)
    velocity = teacher.velocity(*batch())
    expected_high, expected_low = guided_by_hand(high, 4.0, *batch()), guided_by_hand(low, 3.0, *batch())
    expected = torch.where((1000 * SIGMA >= 875.0)[:, None, None, None], expected_high, expected_low)
    assert relative_error(velocity, expected) <= 1e-5
    assert relative_error(expected_high, expected_low) > 0.1
    assert calls == {"high": [4], "low": [4]}


def test_guidance_of_one_for_one_expert_saves_its_half_only(tmp_path):
    scales = {"guidance_scale": 1.0, "guidance_scale_2": 3.0}
    teacher, (high, low) = make_teacher(tmp_path, two_experts=True, **scales)
    calls = count_calls(teacher)
    velocity = teacher.velocity(*batch())
    expected = torch.cat([guided_by_hand(low, 3.0, *batch())[:2], guided_by_hand(high, 1.0, *batch())[2:]])
    assert relative_error(velocity, expected) <= 1e-5
    assert calls == {"high": [2], "low": [4]}


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_a_noise_level_on_the_boundary_is_high_as_in_diffusers(tmp_path, boundary):
    teacher, _ = make_teacher(tmp_path, two_experts=True, boundary_ratio=boundary)
    calls = count_calls(teacher)
    latents, _, prompt_embeds, lengths = (part[:2] for part in batch())
    below = torch.nextafter(torch.tensor(boundary) - 1e-4, torch.tensor(0.0))
    teacher.velocity(latents, torch.stack([torch.tensor(boundary), below]), prompt_embeds, lengths)
    assert calls == {"high": [2], "low": [2]}
    assert float(sigma_to_timestep(torch.tensor(boundary))) >= boundary * 1000


# ---- invariant 5: never trained, never written to ----


def test_the_teacher_never_changes_and_takes_no_gradient(tmp_path):
    teacher, _ = make_teacher(tmp_path, two_experts=True)
    before = {name: {k: v.clone() for k, v in expert.state_dict().items()} for name, expert in teacher.experts.items()}
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    latents, sigma, prompt_embeds, lengths = batch()
    for _ in range(3):
        velocity = teacher.velocity(latents.requires_grad_(), sigma, prompt_embeds.requires_grad_(), lengths)
        assert not velocity.requires_grad
    for name, expert in teacher.experts.items():
        assert not expert.training
        assert all(not p.requires_grad and p.grad is None for p in expert.parameters())
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in expert.state_dict().items())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files
    assert torch.equal(latents, batch()[0]) and torch.equal(prompt_embeds, batch()[2])


# ---- a teacher in host memory ----


def ask(teacher: Teacher, *sigmas: float) -> torch.Tensor:
    latents, _, prompt_embeds, lengths = (part[: len(sigmas)] for part in batch())
    return teacher.velocity(latents, torch.tensor(sigmas), prompt_embeds, lengths)


def test_swaps_are_the_changes_of_the_expert_in_use(tmp_path):
    teacher, _ = make_teacher(tmp_path, two_experts=True)
    counts = []
    for sigmas in [(0.9, 1.0), (0.9, 0.875), (0.5, 0.1), (0.1, 0.2), (0.9, 0.1), (0.9, 0.1), (0.95,), (0.3,)]:
        ask(teacher, *sigmas)
        counts.append(teacher.num_swaps)
    # A batch for both begins with the expert in use: low then high, high then low, and once more high.
    assert counts == [0, 0, 1, 1, 2, 3, 4, 5]


class LateCopies(TorchDispatchMode):
    """Copies on another stream than the main one happen as late as the main one's waits allow, and must have waited for it."""

    def __init__(self):
        super().__init__()
        self.main, self.queue, self.has_waited = torch.cpu.current_stream(), [], False

    def wait_stream(self, waiting, _other) -> None:
        self.has_waited = waiting is not self.main
        if waiting is self.main:
            while self.queue:
                torch.ops.aten.copy_.default(*self.queue.pop(0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.cpu.current_stream() is self.main:
            self.has_waited = False
            return func(*args, **kwargs or {})
        assert self.has_waited and func is torch.ops.aten.copy_.default, "what is in the room may still be read"
        self.queue.append(args[:2])
        return args[0]


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("rooms", [2, 3, 5])
@pytest.mark.parametrize("two_experts", [False, True], ids=["one", "two"])
def test_an_offloaded_teacher_answers_bit_for_bit_as_one_that_stays(tmp_path, two_experts, rooms, fp8):
    write_pipeline_folder(tmp_path, two_experts=two_experts, layers=5)
    wan_files = open_wan_files(tmp_path)
    settings = resolve_settings(wan_files, guidance_scale=4.0)
    offloaded, teacher = (Teacher(project_experts(wan_files, 512, fp8=fp8), settings, NEGATIVE) for _ in range(2))
    asked = [(0.9, 1.0, 0.2, 0.3), (0.9, 0.95), (0.5, 0.1), (0.9, 0.1, 0.2), (0.6,)]
    late = LateCopies()
    with mock.patch.object(torch.cpu.Stream, "wait_stream", lambda *streams: late.wait_stream(*streams)), late:
        StreamedBlocks(offloaded.experts, "cpu", rooms)
        answers = [ask(offloaded, *sigmas) for sigmas in asked]
    assert all(torch.equal(answer, ask(teacher, *sigmas)) for sigmas, answer in zip(asked, answers, strict=True))
    assert offloaded.num_swaps == teacher.num_swaps == (5 if two_experts else 0)


# ---- settings ----


class Headers:
    """An expert of which only the shape is known."""

    def __init__(self, heads: int, channels: int, ffn_dim: int, depth: int):
        shape = {"hidden_size": 128 * heads, "num_heads": heads, "ffn_dim": ffn_dim, "depth": depth}
        self.config = StudentConfig(block="wan", num_channels=channels, image_size=512, **shape)


RELEASED = {  # Wan2.1, Wan2.2: wan/configs; heads, channels, ffn_dim, layers, experts; shift, steps, guidance, boundary, VAE factor
    "Wan2.1-T2V-1.3B": ((12, 16, 8960, 30, 1), (5.0, 50, 5.0, None, None, 8)),
    "Wan2.1-T2V-14B": ((40, 16, 13824, 40, 1), (5.0, 50, 5.0, None, None, 8)),
    "Wan2.2-T2V-A14B": ((40, 16, 13824, 40, 2), (12.0, 40, 4.0, 3.0, 0.875, 8)),
    "Wan2.2-TI2V-5B": ((24, 48, 14336, 30, 1), (5.0, 50, 5.0, None, None, 16)),
}


def released(name: str, **recorded) -> WanFiles:
    *shape, num_experts = RELEASED[name][0]
    return WanFiles(name, {side: Headers(*shape) for side in ("high", "low")[:num_experts]}, recorded)


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("recorded", [{}, {"shift": 3.0}])
def test_a_released_model_has_its_own_settings_whatever_a_converted_folder_records(name, recorded):
    settings = resolve_settings(released(name, **recorded))
    found = (settings.shift, settings.num_inference_steps, settings.guidance_scale, settings.guidance_scale_2)
    assert (*found, settings.boundary_ratio, settings.vae_scale_factor) == RELEASED[name][1]
    assert settings.preset == name and settings.is_released and settings.uses_guidance
    channels = RELEASED[name][0][1]
    assert (settings.latents_mean, settings.latents_std) == RELEASED_LATENTS[channels]
    assert len(settings.latents_mean) == len(settings.latents_std) == channels


def test_the_known_latents_statistics_are_those_of_diffusers():
    import inspect

    from diffusers import AutoencoderKLWan

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert RELEASED_LATENTS[16] == (defaults["latents_mean"].default, defaults["latents_std"].default)


@pytest.mark.parametrize("flag", ["guidance_scale_2", "boundary_ratio"])
def test_flags_of_a_second_expert_are_refused_for_a_teacher_of_one(flag):
    with pytest.raises(UserError, match=f"--{flag}"):
        resolve_settings(released("Wan2.1-T2V-14B"), **{flag: 0.9})


def test_an_unknown_model_is_described_by_its_folder(tmp_path):
    write_pipeline_folder(tmp_path, two_experts=True, flow_shift=6.5, boundary_ratio=0.6)
    wan_files = open_wan_files(tmp_path)
    settings = resolve_settings(wan_files)
    assert (settings.shift, settings.boundary_ratio, settings.is_released) == (6.5, 0.6, False)
    assert settings.guidance_scale == settings.guidance_scale_2 == 5.0
    assert settings.latents_mean == wan_files.record["latents_mean"] != RELEASED_LATENTS[16][0]


def test_a_teachers_own_record_goes_before_its_scheduler(tmp_path):
    write_pipeline_folder(tmp_path, flow_shift=3.0)
    (tmp_path / "teacher_record.json").write_text('{"shift": 2.0, "guidance_scale": 4.0, "negative_prompt": "blurry"}')
    settings = resolve_settings(open_wan_files(tmp_path))
    assert (settings.shift, settings.guidance_scale, settings.negative_prompt) == (2.0, 4.0, "blurry")
    assert resolve_settings(open_wan_files(tmp_path), shift=9.0).shift == 9.0
