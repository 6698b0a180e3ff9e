"""Prompts become the embeddings that diffusers' own WanPipeline makes of them, from every layout of the encoder and from the cache.

The encoder is loaded once and leaves memory; a damaged shard is encoded again; what is no whole UMT5 is refused by name.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.gguf_files import finish
from support.wan_folders import tiny_text_encoder, tiny_tokenizer
from support.wan_parts import scaled, sentencepiece_model, umt5_to_original
from wandistiller.errors import UserError
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder, open_tokenizer, vocabulary
from wandistiller.wan.umt5 import COPY

TEXT_DIM = 16
PROMPTS = [
    "A red fox in fresh snow, golden light",
    "",
    "  two   spaces\u3000and &amp;amp; entities &lt;b&gt; ",
    "cafÃ© façade, Día de los Muertos — “quotes”",
    "word " * 700,
]
SHORT = PROMPTS[:-1]


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("wan"), tiny_tokenizer()
    tiny_text_encoder(len(tokenizer), TEXT_DIM, seed=0).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def pipeline_folder(saved_pipeline, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "wan"))


@pytest.fixture(scope="module")
def oracle(saved_pipeline) -> torch.Tensor:
    """What diffusers gives for PROMPTS: (B, 512, text_dim)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(saved_pipeline / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(saved_pipeline / "text_encoder"),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    return embeds


def encode(folder: Path, prompts=PROMPTS, **settings):
    progress = settings.pop("progress", None)
    return encode_prompts(prompts, files_of(folder), folder.parent / "cache", EncodingOptions(**settings), progress)


def files_of(folder: Path) -> TextEncoderFiles:
    return TextEncoderFiles(folder / "text_encoder", folder / "tokenizer")


def padded(embeds, slots: int = 512) -> torch.Tensor:
    prompt_embeds, _ = embeds.batch(range(len(embeds)))
    return torch.nn.functional.pad(prompt_embeds, (0, 0, 0, slots - prompt_embeds.shape[1]))


def forbid_encoder(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # any import of it now fails


def edit_weights(folder: Path, edit) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_embeddings_equal_diffusers_fresh_and_from_the_cache(pipeline_folder, oracle, monkeypatch):
    seen = []
    fresh = encode(pipeline_folder, progress=lambda *done: seen.append(done))
    torch.testing.assert_close(padded(fresh), oracle, rtol=0, atol=1e-6)
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    assert (len(fresh), fresh.text_dim, fresh.num_full) == (len(PROMPTS), TEXT_DIM, 1)

    forbid_encoder(monkeypatch)
    cached = encode(pipeline_folder, PROMPTS[::-1])
    assert torch.equal(padded(cached), padded(fresh).flip(0))
    assert cached.num_full == 1


def test_a_batch_is_padded_with_zeros_to_its_longest_prompt(pipeline_folder):
    prompt_embeds, lengths = encode(pipeline_folder, ["abcd", "", "ab"]).batch(torch.tensor([2, 1]))
    assert lengths.tolist() == [4, 1] and prompt_embeds.shape == (2, 4, TEXT_DIM)
    assert prompt_embeds[1, 0].any() and not prompt_embeds[1, 1:].any()


def test_the_encoder_has_left_memory(pipeline_folder):
    from transformers import UMT5EncoderModel

    def count() -> int:
        return sum(type(thing) is UMT5EncoderModel for thing in gc.get_objects())

    before = count()
    assert len(encode(pipeline_folder, SHORT)) == len(SHORT) and count() == before


def test_only_the_prompts_the_cache_lacks_are_encoded(pipeline_folder):
    encode(pipeline_folder, ["one", "two"])
    seen = []
    embeds = encode(pipeline_folder, ["two", "three", "  three ", "one"], progress=lambda *done: seen.append(done))
    assert seen == [(1, 1)] and len(embeds) == 4


def test_changed_weights_tokenizer_or_slots_miss_the_cache(pipeline_folder):
    before = padded(encode(pipeline_folder, ["fox"]))
    edit_weights(pipeline_folder, lambda weights: weights["encoder.final_layer_norm.weight"].mul_(2))
    torch.testing.assert_close(padded(encode(pipeline_folder, ["fox"])), 2 * before)
    edit_weights(pipeline_folder, lambda weights: weights["shared.weight"][-1].mul_(2))
    encode(pipeline_folder, ["fox"])
    encode(pipeline_folder, ["fox"], text_max_length=2)
    tokenizer = pipeline_folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    encode(pipeline_folder, ["fox"])
    assert len(list(pipeline_folder.parent.glob("cache/*"))) == 5


@pytest.mark.parametrize("damage", [lambda raw: raw[:-7], lambda raw: b"", lambda raw: b"\xff" * len(raw)])
def test_a_damaged_shard_is_reported_encoded_again_and_replaced(pipeline_folder, oracle, caplog, damage):
    encode(pipeline_folder, SHORT)
    (shard,) = pipeline_folder.parent.glob("cache/*/*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    torch.testing.assert_close(padded(encode(pipeline_folder, SHORT)), oracle[: len(SHORT)], rtol=0, atol=1e-6)
    assert "damaged" in caplog.text
    caplog.clear()
    encode(pipeline_folder, SHORT)
    assert not caplog.text


@pytest.mark.parametrize("byte", [-1, -2, 1])
def test_an_embedding_that_is_not_what_was_written_is_refused(pipeline_folder, byte):
    """A flipped bit leaves a whole file of numbers; without checksums in the header nothing would tell."""
    encode(pipeline_folder, ["fox"])
    (shard,) = pipeline_folder.parent.glob("cache/*/*.safetensors")
    content = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[byte if byte < 0 else start + byte] ^= 0x40
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged, an embedding in it is not what was written; remove this file"):
        encode(pipeline_folder, ["fox"]).read(0)
    save_file(load_file(shard), shard)
    assert encode(pipeline_folder, ["fox"]).read(0).isfinite().all()  # encoded again, as there are no checksums


def test_what_was_encoded_before_a_stop_is_kept(pipeline_folder, monkeypatch):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(pipeline_folder, ["longest", "middle", "end"], progress=stop)
    assert not list(pipeline_folder.parent.glob("cache/*/.*"))
    forbid_encoder(monkeypatch)
    assert len(encode(pipeline_folder, ["longest", "middle"])) == 2


def test_a_sharded_encoder_gives_the_same_embeddings(pipeline_folder, oracle):
    from transformers import UMT5EncoderModel

    folder = pipeline_folder / "text_encoder"
    encoder = UMT5EncoderModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    encoder.save_pretrained(folder, max_shard_size="5KB")
    assert (folder / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(padded(encode(pipeline_folder, SHORT)), oracle[: len(SHORT)], rtol=0, atol=1e-6)


def test_another_precision_is_that_of_transformers(pipeline_folder, dtype=torch.bfloat16):
    from transformers import UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder", dtype=dtype)
    ours = files_of(pipeline_folder).umt5.load(dtype)
    tensors = ours.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in theirs.state_dict().items())
    assert all(tensors[name].dtype == value.dtype for name, value in theirs.state_dict().items())


# ---- the layouts that people have ----


def to_gguf(name: str) -> str:
    """Return llama.cpp's name of a transformers tensor (gguf.MODEL_ARCH.T5ENCODER)."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 9)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight"


def write_tokenizer(writer: gguf.GGUFWriter, end: int = 1) -> None:
    """Write the fields that llama.cpp's converter makes of SentencePiece's model (convert_hf_to_gguf.py: T5Model.set_vocab)."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    writer.add_tokenizer_model("t5")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(model.normalizer_spec.remove_extra_whitespaces)
    writer.add_eos_token_id(end)


def write_layout(layout: str, folder: Path, tensors: dict) -> tuple[Path, dict]:
    """Write an encoder as people have it; return what --text_encoder_path is given, and the tensors that it means."""
    half = {name: tensor.to(torch.float16 if "fp16" in layout else torch.bfloat16) for name, tensor in tensors.items()}
    meant = {name: tensor.float() for name, tensor in half.items()}
    place = folder / "models"
    path = place / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    path.parent.mkdir(parents=True)
    inside = {"spiece_model": torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)}
    if layout in ("comfyui bf16", "comfyui fp16"):
        save_file(half | inside, path)
    elif layout in ("comfyui fp8_scaled", "blocks of fp8_scaled"):
        stored, meant = scaled(tensors, blocks=layout.startswith("blocks"))
        save_file(stored | inside, path)
    elif layout == "comfyui fp8":
        stored = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in tensors.items()}
        meant = {name: value.float() for name, value in stored.items()}
        save_file(stored | inside, path)
    elif layout == "all in one":
        others = {"model.diffusion_model.head.modulation": torch.ones(2), "first_stage_model.conv1.bias": torch.ones(2)}
        part = {f"text_encoders.umt5xxl.transformer.{name}": value for name, value in half.items()}
        part |= {f"text_encoders.umt5xxl.{name}": value for name, value in inside.items()}
        save_file(part | others | {"text_encoders.umt5xxl.logit_scale": torch.tensor(4.6)}, path)
        place = path
    elif layout.startswith("gguf"):
        place = path.with_suffix(".gguf")
        writer = gguf.GGUFWriter(path=None, arch="t5encoder")
        if layout == "gguf with its tokenizer":
            write_tokenizer(writer)
        else:
            (path.parent / "spiece.model").write_bytes(sentencepiece_model())
        for name, value in tensors.items():
            kind = gguf.GGMLQuantizationType.Q8_0 if value.ndim == 2 and not value.shape[1] % 32 else None
            stored = value.numpy() if kind is None else gguf.quants.quantize(value.numpy(), kind)
            writer.add_tensor(to_gguf(name), stored, raw_dtype=kind)
            back = value if kind is None else torch.from_numpy(gguf.quants.dequantize(stored, kind))
            meant[name] = back.reshape(value.shape).float()
        finish(writer, place)
    else:
        place = folder / "original"
        (place / "google" / "umt5-xxl").mkdir(parents=True)
        (place / "google" / "umt5-xxl" / "spiece.model").write_bytes(sentencepiece_model())
        original = {umt5_to_original(name): value for name, value in half.items()}
        if layout == "original pth":
            torch.save(original, place / "models_t5_umt5-xxl-enc-bf16.PTH")
        else:
            save_file(original, place / "umt5-xxl-enc-bf16.safetensors")
    return place, meant


LAYOUTS = ["comfyui bf16", "comfyui fp16", "comfyui fp8", "comfyui fp8_scaled", "blocks of fp8_scaled", "all in one"]
LAYOUTS += ["gguf", "gguf with its tokenizer", "original pth", "original safetensors"]
TEXTS = ["a red fox", "", "  golden \uff42oat ½"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_embeddings_of_transformers_with_the_weights_it_means(pipeline_folder, tmp_path, layout):
    from sentencepiece import SentencePieceProcessor
    from transformers import UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(pipeline_folder / "text_encoder")
    tensors = {name: value.clone() for name, value in encoder.state_dict().items() if "embed_tokens" not in name}
    place, meant = write_layout(layout, tmp_path / "layout", tensors)
    encoder.load_state_dict(meant | {"encoder.embed_tokens.weight": meant["shared.weight"]})
    embeds = encode_prompts(TEXTS, find_text_encoder(place), tmp_path / "cache")
    assert embeds.text_dim == TEXT_DIM
    processor = SentencePieceProcessor(model_proto=sentencepiece_model())
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            expected = encoder(torch.tensor([[*processor.encode(text), 1]])).last_hidden_state[0]
        torch.testing.assert_close(embeds.read(number), expected, rtol=0, atol=1e-6)


def test_sentencepiece_and_a_tokenizers_json_of_the_same_words_agree(tmp_path):
    """transformers' T5Tokenizer, around the same pieces, is the oracle."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5TokenizerFast

    (tmp_path / "spiece.model").write_bytes(sentencepiece_model())
    processor = SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "json")
    texts = ["a red fox", "", "golden boat"]  # which need no normalising
    assert open_tokenizer(tmp_path)(texts) == open_tokenizer(tmp_path / "json")(texts)
    words = sorted(piece[1:] for piece, _ in pieces if piece.startswith("\u2581") and len(piece) > 1)
    assert vocabulary(tmp_path) == vocabulary(tmp_path / "json") == words and "a" in words


@pytest.mark.parametrize("end", [2, 99])
def test_a_gguf_whose_tokenizer_is_another_is_refused(tmp_path, end):
    writer = gguf.GGUFWriter(path=None, arch="t5encoder")
    write_tokenizer(writer, end)
    finish(writer, tmp_path / "umt5.gguf")
    with pytest.raises(UserError, match=r"umt5\.gguf: is not a whole GGUF file"):
        open_tokenizer(tmp_path / "umt5.gguf")


def test_a_file_without_a_tokenizer_says_what_to_copy(pipeline_folder, tmp_path):
    weights = Path(shutil.copy(pipeline_folder / "text_encoder" / "model.safetensors", tmp_path / "umt5.safetensors"))
    writer = gguf.GGUFWriter(path=None, arch="t5encoder")
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    finish(writer, tmp_path / "model.gguf")
    for path in (weights, tmp_path / "model.gguf"):
        with pytest.raises(UserError, match=f"{path.name}: holds no tokenizer.*copy that of google/umt5-xxl"):
            find_text_encoder(path)
    shutil.copy(weights, tmp_path / "umt5_fp8.safetensors")
    with pytest.raises(UserError, match="several text encoders"):
        find_text_encoder(tmp_path)


# ---- what is refused ----


def write_config(folder: Path, **changes) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "outside.safetensors")
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NORM, QUERY = "encoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder"), r"text_encoder: holds no \.safetensors weights"),
        (lambda f: write_config(f, model_type="t5"), "model_type='t5'"),
        (lambda f: write_config(f, num_layers=10**9), "num_layers=1000000000; .* has num_layers=2"),
        (
            lambda f: write_config(f, layer_norm_epsilon=424626),
            "layer_norm_epsilon is 424626; allowed: a number from 0 to 1",
        ),
        (lambda f: (f / "text_encoder" / "config.json").write_text("{"), r"config\.json: line 1, column 2: not valid"),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "weights; allowed: model.safetensors"),
        (lambda f: write_index(f, {"shared.weight": "../outside.safetensors"}), "names '../outside.safetensors'"),
        (lambda f: write_index(f, {"shared.weight": "pytorch_model.bin"}), "is no .safetensors file"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer: holds no tokenizer\.json or spiece\.model"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
        (lambda f: edit_weights(f, lambda w: w["shared.weight"].zero_()), "all zeros"),
        (lambda f: edit_weights(f, lambda w: w.update({COPY: 2 * w["shared.weight"]})), "unlike its copy"),
        (lambda f: edit_weights(f, lambda w: w["shared.weight"].fill_(torch.nan)), "not finite"),
        (lambda f: edit_weights(f, lambda w: w.pop(NORM)), f"1 of .* are missing, the first is {NORM}"),
        (lambda f: edit_weights(f, lambda w: w.pop("shared.weight")), "holds no UMT5 text encoder"),
        (lambda f: edit_weights(f, lambda w: w.update({"encoder.adapter": w[QUERY].clone()})), "'encoder.adapter'"),
        (lambda f: (f.parent / "cache").write_text(""), "cache is a file; give a folder"),
    ],
)
def test_an_unusable_encoder_tokenizer_or_cache_is_refused(pipeline_folder, spoil, said):
    spoil(pipeline_folder)
    with pytest.raises(UserError, match=said):
        encode(pipeline_folder, ["fox"])


def test_nothing_but_our_tensors_decides_what_is_loaded(pipeline_folder, oracle):
    """transformers would read the pickle, the adapter and the other tokenizer that these fields name."""
    folder = pipeline_folder / "text_encoder"
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write_config(pipeline_folder, transformers_weights="adapter_model.bin", quantization_config={"quant_method": "fp8"})
    config = pipeline_folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "RagTokenizer", "tokenizer_file": "/elsewhere.json"}))
    torch.testing.assert_close(padded(encode(pipeline_folder, SHORT)), oracle[: len(SHORT)], rtol=0, atol=1e-6)


def test_a_tokenizer_of_another_model_is_refused(pipeline_folder):
    edit_weights(pipeline_folder, lambda w: w.update({"shared.weight": w["shared.weight"][:9].clone()}))
    write_config(pipeline_folder, vocab_size=9)
    with pytest.raises(UserError, match="knows 9 tokens"):
        encode(pipeline_folder, ["fox"])


def test_mock_embeddings_depend_on_the_prompt_alone():
    embeds = mock_prompt_embeds(["a red fox", "", "w " * 20], TEXT_DIM, text_max_length=8)
    prompt_embeds, lengths = embeds.batch([0, 1, 2])
    assert lengths.tolist() == [4, 1, 8] and embeds.num_full == 1
    again, _ = mock_prompt_embeds(["other", "a red fox"], TEXT_DIM).batch([1])
    assert torch.equal(again[0], prompt_embeds[0, :4])
    assert not torch.equal(prompt_embeds[0, 0], prompt_embeds[1, 0])
