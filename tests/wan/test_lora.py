"""A Wan LoRA is merged as it was meant, whichever trainer wrote it, and anything else is refused in one message.

The oracle is diffusers: its own `load_lora_weights` and `fuse_lora` on a Wan of the true structure, whose velocities must be those
of the teacher that is read with the same file. Where diffusers reads no such file, PEFT merges it, or the definition does.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load_file, save_file

from support.loras import (
    LINEARS,
    comfyui_keys,
    diffusers_keys,
    kohya_keys,
    merged,
    random_differences,
    random_pairs,
    write,
)
from support.wan_folders import (
    inputs,
    oracle_velocity,
    random_transformer,
    relative_error,
    to_original,
    with_weights,
    write_pipeline_folder,
    write_single_file,
    write_transformer_folder,
)
from wandistiller.errors import UserError
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.lora import HADAMARD
from wandistiller.wan.wan_files import merge_loras

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a tiny Wan, and its transformer."""
    folder = tmp_path_factory.mktemp("teacher") / "transformer"
    return folder, write_transformer_folder(folder)


def velocity(path, *loras, expert: str = "high"):
    model, _ = project_teacher(path, expert=expert, loras=list(loras))
    with torch.no_grad():
        return model(*inputs())


def fused_by_diffusers(model, path, scale: float):
    """What diffusers makes of the file: velocities of a pipeline whose transformer has the LoRA fused in."""
    own = with_weights(model, model.state_dict())
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=own
    )
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
    pipeline.fuse_lora(components=["transformer"], lora_scale=scale)
    return oracle_velocity(own, *inputs())


def check_against_diffusers(teacher, path, scale: float) -> None:
    folder, model = teacher
    plain, expected = oracle_velocity(model, *inputs()), fused_by_diffusers(model, path, scale)
    assert relative_error(plain, expected) > 0.01  # else the LoRA changes too little to tell
    assert relative_error(velocity(folder, (path, scale)), expected) < TOLERANCE


# ---- the layouts that diffusers reads ----


def comfyui_with_biases(pairs):
    """As of distilled LoRAs: every layer with a difference of its bias, and the head with one of its weight."""
    model = random_transformer()
    biases = random_differences(model, [f"{name}.bias" for name in pairs] + ["proj_out.weight", "proj_out.bias"])
    return comfyui_keys(pairs, differences=biases)


LAYOUTS = {
    "diffusers": diffusers_keys,
    "kohya": lambda pairs: kohya_keys(pairs, alpha=1.5),
    "ComfyUI, lora_down": lambda pairs: comfyui_keys(pairs, alpha=2.0),
    "ComfyUI, lora_A": lambda pairs: comfyui_keys(pairs, words=("lora_A", "lora_B")),
    "ComfyUI, biases and head": comfyui_with_biases,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_lora_in_the_teacher_answers_as_diffusers_fuses_it(teacher, tmp_path, layout, scale):
    path = write(tmp_path / "lora.safetensors", LAYOUTS[layout](random_pairs(teacher[1])))
    check_against_diffusers(teacher, path, scale)


def test_layers_outside_the_blocks_are_merged_as_diffusers_fuses_them(teacher, tmp_path):
    embedder = "condition_embedder"
    outside = [f"{embedder}.time_proj", "proj_out"]
    outside += [f"{embedder}.{name}_embedder.linear_{number}" for name in ("time", "text") for number in (1, 2)]
    pairs = random_pairs(teacher[1], [*outside, "blocks.0.attn1.to_q"])
    for name, keys in {"original": comfyui_keys(pairs), "diffusers": diffusers_keys(pairs)}.items():
        check_against_diffusers(teacher, write(tmp_path / f"{name}.safetensors", keys), 1.0)


def test_alphas_in_the_metadata_that_diffusers_saves_count(teacher, tmp_path):
    """diffusers itself writes the file: a rank of 4, an alpha of 6 and another one for a module."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    _, model = teacher
    own = with_weights(model, model.state_dict())
    targets, patterns = ["to_q", "ffn.net.2"], {"blocks.1.attn1.to_q": 20}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, alpha_pattern=patterns, init_lora_weights=False)
    torch.manual_seed(0)
    own.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(own),
        weight_name="lora.safetensors",
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    check_against_diffusers(teacher, tmp_path / "lora.safetensors", 0.5)


def test_each_of_two_experts_gets_its_own_lora(tmp_path):
    experts = write_pipeline_folder(tmp_path / "two", two_experts=True)
    files = {}
    for name, model, seed in (("high", experts[0], 0), ("low", experts[1], 7)):
        path = write(tmp_path / f"{name}.safetensors", kohya_keys(random_pairs(model, seed=seed), alpha=1.0))
        files[name] = [(path, 0.8)]
    wan_files = merge_loras(open_wan_files(tmp_path / "two"), **files)
    for name, model in project_experts(wan_files, 512).items():
        expected = fused_by_diffusers(experts[name == "low"], files[name][0][0], 0.8)
        with torch.no_grad():
            assert relative_error(model(*inputs()), expected) < TOLERANCE


# ---- what diffusers does not read: by definition ----


def test_every_difference_of_a_distilled_lora_is_added(teacher, tmp_path):
    """Of every tensor there is, norms and modulation tables too, which diffusers passes over."""
    folder, model = teacher
    differences = random_differences(model, [name for name, _ in model.named_parameters()])
    path = write(tmp_path / "lora.safetensors", comfyui_keys({}, differences=differences))
    expected = oracle_velocity(with_weights(model, merged(model, {}, 1.0, differences, 0.7)), *inputs())
    assert relative_error(velocity(folder, (path, 0.7)), expected) < TOLERANCE


def test_a_product_of_kernels_changes_the_patch_kernel(teacher, tmp_path):
    folder, model = teacher
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, 1, 2, 2, generator=generator), torch.randn(24, 2, 1, 1, 1, generator=generator)
    keys = diffusers_keys({"patch_embedding": (down, up)})
    tensors = merged(model, {})
    tensors["patch_embedding.weight"] += torch.einsum("orxyz,rcfhw->ocfhw", up, down)
    expected = oracle_velocity(with_weights(model, tensors), *inputs())
    assert relative_error(velocity(folder, (write(tmp_path / "a.safetensors", keys), 1.0)), expected) < TOLERANCE


IN_BLOCKS = re.compile(r"lora_unet_blocks_(\d+)_(self_attn|cross_attn|ffn)_")
WHOLE = "alphas of whole numbers"
DIALECTS = {
    WHOLE: (kohya_keys, lambda key: key),
    "VideoX-Fun": (kohya_keys, lambda key: key.replace("lora_unet_", "lora_unet__")),
    "half dots": (kohya_keys, lambda key: IN_BLOCKS.sub(r"lora_unet_blocks_\1.\2.", key)),
    "LyCORIS": (kohya_keys, lambda key: key.replace("lora_unet_", "lycoris_")),
    "compiled": (kohya_keys, lambda key: key.replace("lora_unet_", "lora_unet__orig_mod_")),
    "SimpleTuner": (diffusers_keys, lambda key: key.replace("transformer.", "transformer.base_model.model.")),
    "compiled of diffusers": (diffusers_keys, lambda key: key.replace("transformer.", "transformer._orig_mod.")),
    "an adapter's name": (diffusers_keys, lambda key: key.replace(".weight", ".my-style.weight")),
    "no prefix": (diffusers_keys, lambda key: key.removeprefix("transformer.")),
    "sharded": (diffusers_keys, lambda key: key.replace("to_q", "_fsdp_wrapped_module.to_q")),
    "LyCORIS with dots": (kohya_keys, lambda key: key.replace("lora_unet_blocks_", "lycoris.blocks.")),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_the_keys_is_known(teacher, tmp_path, dialect):
    folder, model = teacher
    pairs, (keys, spelt) = random_pairs(model), DIALECTS[dialect]
    is_kohya = keys is kohya_keys
    tensors = kohya_keys(pairs, 6.0) if is_kohya else diffusers_keys(pairs)
    if dialect == WHOLE:
        tensors = {key: value if value.ndim else value.long() for key, value in tensors.items()}
    path = write(tmp_path / "lora.safetensors", {spelt(key): value for key, value in tensors.items()})
    expected = oracle_velocity(with_weights(model, merged(model, pairs, 2.0 if is_kohya else 1.0)), *inputs())
    assert relative_error(velocity(folder, (path, 1.0)), expected) < TOLERANCE


# ---- against PEFT's own arithmetic ----


def of_peft(folder: Path, model, config) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter of random values as PEFT does; return its file and the state dict with PEFT's merge of it."""
    import peft

    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "hada_" in name or "lokr_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder / "adapter_model.safetensors", adapted.merge_and_unload().state_dict()


PATTERNS = {"ffn.net.2": 5, r"blocks\.[01]\.attn1.to_.": 7, "blocks.1.attn2.to_k": 3}


@pytest.mark.parametrize("kind", ["patterns", "rslora", "DoRA"])
def test_pefts_patterns_scales_and_doras_count_as_peft_merges_them(teacher, tmp_path, kind):
    import peft

    folder, model = teacher
    linears = r"blocks\..*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
    settings = {
        "patterns": {"alpha_pattern": PATTERNS, "rank_pattern": {"^blocks.0.attn1.to_q": 2, "to_k": 6}},
        "rslora": {"use_rslora": True},
        "DoRA": {"use_dora": True},
    }[kind]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=linears, init_lora_weights=False, **settings)
    path, weights = of_peft(tmp_path / "lora", model, config)
    expected = oracle_velocity(with_weights(model, weights), *inputs())
    assert relative_error(velocity(folder), expected) > 0.01
    assert relative_error(velocity(folder, (path.parent, 1.0)), expected) < TOLERANCE
    if kind == "DoRA":  # as torch saves a model with the adapter in it
        ends = (".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
        named = {key.replace(*ends): value for key, value in load_file(path).items()}
        save_file(named, path)
        assert relative_error(velocity(folder, (path.parent, 1.0)), expected) < TOLERANCE
    # A scale of 0 leaves the teacher, and of a half goes half of the way from weight to weight of a DoRA.
    assert relative_error(velocity(folder, (path, 0.0)), velocity(folder)) < TOLERANCE


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr of whole matrices", "LoKr of four"])
def test_lycoris_products_are_those_of_pefts_layers(teacher, tmp_path, kind):
    """PEFT has the products of LyCORIS in its own arithmetic; the keys are those of LyCORIS with an alpha for each."""
    import peft

    folder, model = teacher
    linears = r"blocks\..*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
    options = {"r": 2, "alpha": 3, "target_modules": linears}
    if kind == "LoHa":
        config = peft.LoHaConfig(**options, init_weights=False)
    else:
        both = kind == "LoKr of four"
        config = peft.LoKrConfig(**options, init_weights=False, decompose_both=both, decompose_factor=4)
    path, weights = of_peft(tmp_path / "adapter", model, config)
    expected = oracle_velocity(with_weights(model, weights), *inputs())
    assert relative_error(velocity(folder, (path.parent, 1.0)), expected) < TOLERANCE  # by the alpha of PEFT's settings
    keys = {}
    for key, tensor in load_file(path).items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".")
        stem = "lycoris_" + to_original(f"{module}.").removesuffix(".").replace(".", "_")
        keys |= {f"{stem}.{part}": tensor, f"{stem}.alpha": torch.tensor(3.0)}
    if (
        kind == "LoKr of whole matrices"
    ):  # as LyCORIS has it where the rank is that of the matrix; alpha counts for nothing
        for stem in {key.rpartition(".")[0] for key in keys}:
            second = keys.pop(f"{stem}.lokr_w2_a") @ keys.pop(f"{stem}.lokr_w2_b")
            keys[f"{stem}.lokr_w2"] = 1.5 * second
            keys[f"{stem}.alpha"] = torch.tensor(1e10, dtype=torch.float16)
    written = write(tmp_path / "lora.safetensors", keys)
    assert relative_error(velocity(folder), expected) > 0.01
    assert relative_error(velocity(folder, (written, 1.0)), expected) < TOLERANCE


def test_pefts_settings_count_for_whole_matrices_and_for_the_original_names(teacher, tmp_path):
    import peft

    folder, model = teacher
    options = {"alpha": 3, "target_modules": r"blocks\..*to_k", "alpha_pattern": {"attn1.to_k": 5}}
    config = peft.LoKrConfig(r=64, decompose_factor=4, init_weights=False, **options)
    path, weights = of_peft(tmp_path / "adapter", model, config)
    assert any(key.endswith("lokr_w2") for key in load_file(path))
    expected = oracle_velocity(with_weights(model, weights), *inputs())
    settings = path.with_name("adapter_config.json")
    for pattern in ("attn1.to_k", "self_attn.k", "diffusion_model.blocks.*self_attn.k"):
        settings.write_text(settings.read_text().replace("attn1.to_k", pattern))
        assert relative_error(velocity(folder, (path.parent, 1.0)), expected) < TOLERANCE
        settings.write_text(settings.read_text().replace(pattern, "attn1.to_k"))


def test_several_loras_add_up_and_a_negative_scale_takes_away(teacher, tmp_path):
    folder, model = teacher
    first = write(tmp_path / "a.safetensors", kohya_keys(random_pairs(model), alpha=2.0))
    second = write(tmp_path / "b.safetensors", diffusers_keys(random_pairs(model, seed=3)))
    both = velocity(folder, (first, 1.0), (second, 0.5))
    assert relative_error(velocity(folder, (second, 0.5), (first, 1.0)), both) < TOLERANCE
    assert relative_error(velocity(folder, (first, 1.0)), both) > 0.01
    plain = velocity(folder)
    assert relative_error(velocity(folder, (first, 1.0), (first, -1.0)), plain) < TOLERANCE
    assert torch.equal(velocity(folder), plain)


def test_an_fp8_teacher_is_changed_at_the_values_that_it_stands_for(tmp_path):
    model = write_single_file(tmp_path / "wan.safetensors", fp8="scaled")
    pairs = random_pairs(model)
    path = write(tmp_path / "lora.safetensors", comfyui_keys(pairs))
    expected = oracle_velocity(with_weights(model, merged(model, pairs)), *inputs())
    assert relative_error(velocity(tmp_path / "wan.safetensors", (path, 1.0)), expected) < TOLERANCE


def test_a_bf16_lora_in_a_bf16_teacher_is_summed_in_float32(tmp_path):
    model = write_transformer_folder(tmp_path / "wan", dtype=torch.bfloat16)
    pairs = {name: (down.bfloat16(), up.bfloat16()) for name, (down, up) in random_pairs(model).items()}
    path = write(tmp_path / "lora.safetensors", diffusers_keys(pairs))
    expected = merged(model, {name: (down.float(), up.float()) for name, (down, up) in pairs.items()})
    wan_files = merge_loras(open_wan_files(tmp_path / "wan"), [(path, 1.0)])
    for name in (f"blocks.1.{linear}.weight" for linear in LINEARS):
        actual = wan_files.expert("high").read(name)
        assert actual.dtype == torch.float32 and torch.allclose(actual, expected[name], atol=1e-6)
    untouched = wan_files.expert("high").read("proj_out.weight")
    assert untouched.dtype == torch.bfloat16 and torch.equal(untouched.float(), expected["proj_out.weight"])


# ---- what is refused ----


def sdxl(pairs):
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    return {f"{stem}.lora_down.weight": torch.zeros(4, 640), f"{stem}.lora_up.weight": torch.zeros(640, 4)}


def image_to_video(pairs):
    extra = {"blocks.0.attn2.add_k_proj": (torch.zeros(3, 24), torch.zeros(24, 3))}
    return diffusers_keys(pairs | extra)


def larger_wan(pairs):
    return diffusers_keys(
        {name: (torch.cat([down, down], -1), torch.cat([up, up])) for name, (down, up) in pairs.items()}
    )


def deeper_wan(pairs):
    return diffusers_keys(pairs | {f"blocks.39.{LINEARS[0]}": pairs[f"blocks.0.{LINEARS[0]}"]})


def not_finite(pairs):
    keys = kohya_keys(pairs, 1.0)
    keys["lora_unet_blocks_1_ffn_0.lora_up.weight"][3, 1] = float("nan")
    return keys


def without(word):
    return lambda pairs: {name: tensor for name, tensor in comfyui_keys(pairs).items() if word not in name}


def plus(key, value=None):
    return lambda pairs: comfyui_keys(pairs) | {key: torch.ones(3) if value is None else value}


BLOCK = "diffusion_model.blocks.0.self_attn.q"
REFUSED = {
    "SDXL": (sdxl, ["another model", "lora_unet_down_blocks_1"]),
    "image to video": (image_to_video, ["image-to-video (I2V)", "add_k_proj"]),
    "a larger Wan": (larger_wan, [".weight, which is 24x24 in this Wan", "48x3 and 3x48", "another model"]),
    "a deeper Wan": (deeper_wan, ["blocks.39", "a larger Wan"]),
    "no tensors": (lambda pairs: {}, ["holds no tensors"]),
    "alphas alone": (lambda pairs: {f"{BLOCK}.alpha": torch.tensor(1.0)}, [f"has {BLOCK}.alpha and nothing to change"]),
    "an alpha without end": (plus(f"{BLOCK}.alpha", torch.tensor(float("inf"))), ["alpha of shape [] is inf; allowed"]),
    "an alpha of nonsense": (plus(f"{BLOCK}.alpha", torch.tensor(1e30)), ["alpha of shape [] is 1e+30; allowed"]),
    "lengths of another size": (plus(f"{BLOCK}.dora_scale"), ["24x24", "lengths of a DoRA", " of 3;"]),
    "half of a LoKr": (plus(f"{BLOCK}.lokr_w1", torch.ones(4, 4)), ["parts that do not go together, 4x4"]),
    "a LoKr of another size": (
        lambda pairs: {f"{BLOCK}.lokr_w1": torch.ones(4, 4), f"{BLOCK}.lokr_w2": torch.ones(5, 5)},
        ["24x24", "4x4 and 5x5"],
    ),
    "a LoHa that does not multiply": (
        lambda pairs: {f"{BLOCK}.{name}": torch.ones(24, 3) for name in HADAMARD}, ["parts that do not go together"],
    ),
    "OFT": (plus(f"{BLOCK}.oft_blocks"), ["of another kind", "oft_blocks", "LoKr"]),
    "not finite": (not_finite, ["lora_unet_blocks_1_ffn_0.lora_up.weight", "not finite"]),
    "half of it": (without("self_attn.k.lora_up"), ["blocks.0.attn1.to_k.weight", "do not go together"]),
    "twice": (plus("transformer.blocks.0.attn1.to_q.lora_A.weight", torch.zeros(3, 24)), ["twice", "to_q"]),
    "whole numbers": (plus(f"{BLOCK}.diff", torch.zeros(24, 24, dtype=torch.int8)), ["I8", "allowed"]),
    "a difference of another size": (plus("diffusion_model.head.head.diff", torch.zeros(64, 30)), ["64x24", "64x30"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_this_wan_is_refused_in_one_message(teacher, tmp_path, name):
    keys, words = REFUSED[name]
    path = write(tmp_path / "lora.safetensors", keys(random_pairs(teacher[1])))
    with pytest.raises(UserError) as refused:
        project_teacher(teacher[0], loras=[(path, 1.0)])
    message = str(refused.value)
    assert all(word in message for word in [str(path), *words]), message
    assert len(message.replace(str(tmp_path), "")) < 500


def test_what_is_no_safetensors_file_or_no_scale_is_refused_and_no_pickle_is_opened(teacher, tmp_path):
    whole = write(tmp_path / "whole.safetensors", diffusers_keys(random_pairs(teacher[1])))
    (tmp_path / "lora.pt").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:900])
    files = {"lora.pt": "pickle", "cut.safetensors": "not a whole safetensors", "none.safetensors": "no such file"}
    cases = [(tmp_path / name, 1.0, words) for name, words in files.items()]
    for path, scale, words in cases + [(whole, scale, "a scale of") for scale in (math.inf, math.nan, 1e9)]:
        with pytest.raises(UserError, match=words):
            project_teacher(teacher[0], loras=[(path, scale)])
    with pytest.raises(UserError, match="has one expert; give it as --teacher_lora"):
        merge_loras(open_wan_files(teacher[0]), low=[(whole, 1.0)])


@pytest.mark.parametrize(
    "settings, words",
    [
        ('{"transformer.use_dora": true}', "DoRA"),
        (
            '{"init_lora_weights": "pissa_niter_4"}',
            "init_lora_weights is 'pissa_niter_4', which changes the base model too",
        ),
        (
            '{"alpha_pattern": {"self_attn.k": 2, "self_attn.v_proj": 3}}',
            "holds 'self_attn.v_proj', which is the name of no",
        ),
        ('{"r": 0}', "numbers above 0"),
        ('{"transformer.lora_alpha": "six"}', "numbers above 0"),
        ('{"transformer.lora_alpha": -1}', "numbers above 0"),
        ('{"transformer.alpha_pattern": [1]}', "numbers above 0"),
        ("[1]", "holds a list"),
        ("{", "save the LoRA again"),
        *(
            (f'{{"alpha_pattern": {{"{pattern}": 2}}}}', "which is no plain pattern of names")
            for pattern in ("(a+)+", "(a|a)*b", "[", "a*b*c*d*e*", "(?=a)")  # that may take forever
        ),
    ],
)
def test_damaged_settings_in_the_metadata_are_refused(teacher, tmp_path, settings, words):
    keys = diffusers_keys(random_pairs(teacher[1]))
    path = write(tmp_path / "lora.safetensors", keys, {"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=words):
        project_teacher(teacher[0], loras=[(path, 1.0)])
