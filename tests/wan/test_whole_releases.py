"""A whole run from files as people have them: ComfyUI's four in its models/, and an original release's folder, typed as they would."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate_images
import train_distillation
from support.students import STUDENT
from support.wan_folders import (
    A14B_SHAPE,
    random_transformer,
    tiny_text_encoder,
    to_original,
    umt5_xxl_shapes,
    write_hollow_file,
    write_hollow_shards,
    write_original_transformer,
    write_single_file,
)
from support.wan_parts import make_vae, scaled, sentencepiece_model, umt5_to_original, vae_to_original
from wandistiller.model.config import StudentConfig
from wandistiller.wan.transformer_files import teacher_tensor_shapes

WAN = {"heads": 1, "head_dim": 128, "layers": 1, "ffn_dim": 48}


def parts() -> tuple[dict, dict]:
    """The tensors of a text encoder by transformers' names, and of a VAE by the original ones."""
    encoder = tiny_text_encoder(24, 20, 0).state_dict()
    encoder = {name: tensor.clone() for name, tensor in encoder.items() if "embed_tokens" not in name}
    vae = {vae_to_original(name, "2.1"): tensor.clone() for name, tensor in make_vae("2.1").state_dict().items()}
    return encoder, vae


def write_comfyui(folder: Path) -> list[str]:
    encoder, vae = parts()
    for name in ("diffusion_models", "text_encoders", "vae"):
        (folder / name).mkdir(parents=True)
    for seed, side in enumerate(("high", "low")):
        path = folder / "diffusion_models" / f"wan2.2_t2v_{side}_noise_14B_fp8_scaled.safetensors"
        write_single_file(path, fp8="scaled", seed=seed, **WAN)
    words = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    stored = scaled(encoder)[0] | {"spiece_model": words}
    save_file(stored, folder / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(vae, folder / "vae" / "wan_2.1_vae.safetensors")
    return ["--teacher_path", str(folder)]


def write_comfyui_by_file(folder: Path) -> list[str]:
    write_comfyui(folder)
    high, low = sorted((folder / "diffusion_models").iterdir())
    return ["--teacher_path", str(high), "--teacher_path_low", str(low)]


def write_all_in_one(folder: Path) -> list[str]:
    """Two checkpoints that each bring the VAE and the text encoder along, as merges of Wan do."""
    encoder, vae = parts()
    others = {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    others |= {f"text_encoders.umt5xxl.transformer.{name}": tensor for name, tensor in encoder.items()}
    others["text_encoders.umt5xxl.spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    (folder / "checkpoints").mkdir(parents=True)
    for seed, side in enumerate(("high", "low")):
        path = folder / "checkpoints" / f"wan2.2-rapid-aio-{side}.safetensors"
        write_single_file(path, prefix="model.diffusion_model.", seed=seed, **WAN)
        save_file(load_file(path) | others, path)
    return ["--teacher_path", str(path.with_name("wan2.2-rapid-aio-high.safetensors")), "--teacher_path_low", str(path)]


def fp8_scaled(shapes: dict[str, tuple[int, ...]]) -> tuple[dict, dict[str, str]]:
    """Add the scales and the marker of ComfyUI's files to the shapes of a model; return the types that are not bf16 too."""
    scaled_names = [
        name for name, shape in shapes.items() if len(shape) == 2 and "block" in name and "bias" not in name
    ]
    scales = {f"{name.removesuffix('weight')}scale_weight": () for name in scaled_names}
    types = dict.fromkeys([*scaled_names, "scaled_fp8"], "F8_E4M3") | dict.fromkeys(scales, "F32")
    return shapes | scales | {"scaled_fp8": (2,)}, types


def test_a_dry_run_of_the_full_size_takes_the_files_as_they_are(tmp_path, capsys):
    """A14B in full size, whose files are holes: ComfyUI's four, and an original release with the encoder's safetensors copy."""
    from diffusers import AutoencoderKLWan

    config, words = StudentConfig(block="wan", image_size=512, **A14B_SHAPE), sentencepiece_model()
    wan = {to_original(name): shape for name, shape in teacher_tensor_shapes(config).items()}
    with torch.device("meta"):
        vae = {vae_to_original(name, "2.1"): value.shape for name, value in AutoencoderKLWan().state_dict().items()}
    comfyui, original = tmp_path / "models", tmp_path / "Wan2.2-T2V-A14B"
    for name in ("diffusion_models", "text_encoders", "vae"):
        (comfyui / name).mkdir(parents=True)
    (original / "google" / "umt5-xxl").mkdir(parents=True)
    for side in ("high", "low"):
        shapes, types = fp8_scaled(wan)
        file = comfyui / "diffusion_models" / f"wan2.2_t2v_{side}_noise_14B_fp8_scaled.safetensors"
        write_hollow_file(file, shapes, "BF16", types)
        write_hollow_shards(original / f"{side}_noise_model", "diffusion_pytorch_model", wan, "F32", 6)
    shapes, types = fp8_scaled(umt5_xxl_shapes())
    file = comfyui / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    write_hollow_file(file, {"spiece_model": (len(words),)} | shapes, "BF16", types | {"spiece_model": "U8"}, words)
    write_hollow_file(comfyui / "vae" / "wan_2.1_vae.safetensors", vae, "F32")
    encoder = {umt5_to_original(name): shape for name, shape in umt5_xxl_shapes().items()}
    write_hollow_file(original / "umt5-xxl-enc-bf16.safetensors", encoder, "BF16")
    write_hollow_file(original / "Wan2.1_VAE.safetensors", vae, "F32")
    (original / "google" / "umt5-xxl" / "spiece.model").write_bytes(words)
    (tmp_path / "prompts.txt").write_text("a red fox\n", encoding="utf-8")
    for place in (comfyui, original):
        argv = f"--preset A14B-1B --teacher_path {place} --data_path {tmp_path}/prompts.txt --dry_run --assume_gpu 80"
        argv += f" --output_dir {tmp_path}/out --prompt_cache {tmp_path}/cache --save_every 0"
        assert train_distillation.main(argv.split()) == 0
        assert "(high + low), settings from Wan2.2-T2V-A14B: shift 12" in capsys.readouterr().out


def write_original(folder: Path) -> list[str]:
    encoder, vae = parts()
    for seed, side in enumerate(("high", "low")):
        write_original_transformer(folder / f"{side}_noise_model", random_transformer(seed=seed, **WAN))
    torch.save(
        {umt5_to_original(name): tensor.bfloat16() for name, tensor in encoder.items()},
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(sentencepiece_model())
    return ["--teacher_path", str(folder)]


@pytest.mark.parametrize("write", [write_comfyui, write_comfyui_by_file, write_all_in_one, write_original])
def test_a_run_and_its_pictures_need_nothing_but_the_files_as_they_are(tmp_path, write, capsys):
    config = STUDENT | {"hidden_size": 128, "depth": 1, "num_heads": 1, "ffn_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red fox\na blue boat\n", encoding="utf-8")
    both = f"--prompt_cache {tmp_path}/cache --device cpu".split()
    argv = f"--student_config {tmp_path}/config.json --data_path {tmp_path}/prompts.txt --output_dir {tmp_path}/out "
    argv = [*f"{argv}--max_steps 2 --batch_size 2 --num_samples 1".split(), *both, *write(tmp_path / "models")]
    assert train_distillation.main([*argv, "--dry_run"]) == 0
    assert train_distillation.main(argv) == 0
    told = capsys.readouterr().out
    assert "(high + low)" in told and "swapped" not in told
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    draw = f"--student {tmp_path}/out --prompt fox --num_inference_steps 1 --output {tmp_path}/drawn".split()
    assert generate_images.main([*draw, *both]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))
