"""A Wan's VAE is read in every layout, in 2D it decodes and encodes as diffusers' own, and what is no such VAE is refused.

The oracle is diffusers' AutoencoderKLWan, and for Wan2.1's original names diffusers' own converter.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.wan_parts import VAE_SHAPES, vae_to_original
from support.wan_parts import make_vae as make_vae_of
from wandistiller.errors import UserError
from wandistiller.wan.vae import RELEASED_LATENTS, find_vae, load_vae, read_vae_config
from wandistiller.wan.vae_2d import load_vae_2d

FACTORS = {"2.1": 8, "2.2": 16}
FILES = {"2.1": ["wan_2.1_vae.safetensors", "Wan2.1_VAE.pth"], "2.2": ["wan2.2_vae.safetensors", "Wan2.2_VAE.pth"]}


def make_vae(release: str):
    mean, std = RELEASED_LATENTS[VAE_SHAPES[release]["z_dim"]]
    return make_vae_of(release, latents_mean=mean, latents_std=std)


def write(path: Path, tensors: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.save(tensors, path) if path.suffix == ".pth" else save_file(tensors, path)
    return path


def write_original(path: Path, vae, release: str, prefix: str = "") -> Path:
    return write(path, {prefix + vae_to_original(name, release): value for name, value in vae.state_dict().items()})


def assert_same(location: Path, vae, release: str) -> None:
    """A loaded VAE holds the tensors of diffusers' one, and in 2D it gives its numbers."""
    channels = vae.config.z_dim
    read = load_vae(location, channels, FACTORS[release])
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in read.state_dict().items())
    flat = load_vae_2d(location, channels, FACTORS[release])
    latents = torch.randn(2, channels, 2, 3, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in RELEASED_LATENTS[channels])
    with torch.no_grad():
        expected = vae.decode((latents * std + mean)[:, :, None]).sample
        assert distance(flat.decode(latents * std + mean), expected[:, :, 0]) < 1e-6
        assert distance(flat.encode(expected[:, :, 0]), vae.encode(expected).latent_dist.mean[:, :, 0]) < 1e-6
    pictures = (expected[:, :, 0].permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(flat.pictures(latents, None, None) - pictures).max() < 0.51


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("release", VAE_SHAPES)
def test_nothing_3d_is_left_and_large_pictures_are_decoded_in_tiles_without_a_seam(tmp_path, release):
    make_vae(release).save_pretrained(tmp_path)
    channels, factor = VAE_SHAPES[release]["z_dim"], FACTORS[release]
    flat = load_vae_2d(tmp_path, channels, factor)
    assert not any(isinstance(module, torch.nn.Conv3d) for module in flat.modules())
    assert max(tensor.dim() for tensor in flat.state_dict().values()) == 4
    latents = torch.randn(2, channels, 47, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert distance(flat.decode(latents, tile_pixels=16 * factor), flat.decode(latents)) < 1e-6


def test_the_original_names_of_these_tests_are_those_diffusers_converts_from():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    names = list(make_vae("2.1").state_dict())
    converted = convert_wan_vae_to_diffusers({vae_to_original(name, "2.1"): name for name in names})
    assert converted == {name: name for name in names}


@pytest.mark.parametrize("release", VAE_SHAPES)
def test_a_vae_decodes_and_encodes_as_diffusers_does_in_every_layout(tmp_path, release):
    vae = make_vae(release)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    assert_same(find_vae(None, str(tmp_path / "pipeline")), vae, release)
    for name in FILES[release]:
        path = write_original(tmp_path / "files" / name, vae, release)
        assert_same(find_vae(str(path), "mock"), vae, release)
        about = read_vae_config(path, vae.config.z_dim)
        assert (
            about["vae_scale_factor"] == FACTORS[release]
            and about["latents_mean"] == RELEASED_LATENTS[vae.config.z_dim][0]
        )
    whole = write_original(tmp_path / "all_in_one.safetensors", vae, release, prefix="first_stage_model.")
    save_file(load_file(whole) | {"model.diffusion_model.patch_embedding.bias": torch.ones(2)}, whole)
    assert_same(find_vae(None, str(whole)), vae, release)


def test_the_vae_of_a_comfyui_or_original_folder_is_found_by_its_name_and_channels(tmp_path):
    for release in VAE_SHAPES:
        write_original(tmp_path / "models" / "vae" / FILES[release][0], make_vae(release), release)
    (tmp_path / "models" / "vae" / "sdxl_vae.safetensors").write_bytes(b"another")
    for channels, name in ((16, FILES["2.1"][0]), (48, FILES["2.2"][0])):
        found = find_vae(None, str(tmp_path / "models"), channels)
        assert found == tmp_path / "models" / "vae" / name
    with pytest.raises(UserError, match="several VAEs"):
        find_vae(None, str(tmp_path / "models"))
    write_original(tmp_path / "original" / "Wan2.1_VAE.pth", make_vae("2.1"), "2.1")
    assert find_vae(None, str(tmp_path / "original")).name == "Wan2.1_VAE.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vae") / "vae"
    make_vae("2.1").save_pretrained(place)
    return place


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def to_index(folder: Path, name: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "weights.bin")
    shutil.move(weights, folder.parent / "x.safetensors")
    index = {"weight_map": {"decoder.conv_in.weight": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


NAME = "decoder.mid_block.resnets.0.conv1.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: edit_tensors(f, lambda t: t[NAME].fill_(torch.nan)), f"{NAME} holds numbers that are not finite"),
        (lambda f: edit_tensors(f, lambda t: t.update({"decoder.extra": torch.ones(2)})), r"decoder\.extra"),
        (lambda f: edit_tensors(f, lambda t: t.pop(NAME)), f"1 of .* the first is {NAME}"),
        (lambda f: edit_tensors(f, lambda t: t.update({NAME: torch.ones(2, 2)})), f"{NAME}' has shape"),
        (lambda f: edit_tensors(f, lambda t: t.update({NAME: t[NAME].to(torch.int32)})), "stored as I32"),
        (lambda f: edit_tensors(f, lambda t: t.pop("encoder.conv_in.weight")), "holds no VAE of a Wan"),
        (lambda f: to_index(f, "weights.bin"), "is no .safetensors file"),
        (lambda f: to_index(f, "../x.safetensors"), "outside its folder"),
        (lambda f: edit(f, num_res_blocks=10**9), "num_res_blocks is 1000000000, the tensors beside it have 2"),
        (lambda f: edit(f, dim_mult=[1] * 4), "dim_mult is"),
        (lambda f: edit(f, z_dim=8), "z_dim is 8"),
        (lambda f: edit(f, scale_factor_spatial=4), "scale_factor_spatial is 4, the tensors beside it have 8"),
        (lambda f: edit(f, attn_scales=[0.5]), "attn_scales is"),
        (lambda f: edit(f, latents_mean=[0.0]), "latents_mean is"),
        (lambda f: edit(f, _class_name="AutoencoderKL"), "AutoencoderKL'"),
    ],
)
def test_a_vae_that_is_not_whole_or_more_than_one_is_refused_by_name(folder, tmp_path, spoil, said):
    place = Path(shutil.copytree(folder, tmp_path / "vae"))
    spoil(place)
    with pytest.raises(UserError, match=said):
        load_vae(find_vae(str(place), "mock"), 16, 8)


def test_the_vae_of_another_wan_is_refused(folder):
    with pytest.raises(UserError, match="is a VAE of 16 channels and factor 8"):
        load_vae(find_vae(str(folder), "mock"), 48, 16)
