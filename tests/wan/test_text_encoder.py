"""Prompts become the embeddings that diffusers' own WanPipeline makes of them, fresh and from the cache.

The encoder is loaded once and leaves memory; a damaged shard is encoded again.

pytest tests/wan/test_text_encoder.py
"""

import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wandistiller.errors import UserError
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts
from wandistiller.wan.text_encoder_files import TextEncoderFiles

TEXT_DIM = 16
PROMPTS = [
    "A red fox in fresh snow, golden light",
    "",
    "  two   spaces\u3000and &amp;amp; entities &lt;b&gt; ",
    "cafÃ© façade, Día de los Muertos — “quotes”",
    "word " * 700,
]
SHORT = PROMPTS[:-1]


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that, like UMT5's, pads with 0 and ends with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory) -> Path:
    from transformers import UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    shape = {"d_model": TEXT_DIM, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(vocab_size=272, **shape)).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
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
    files = TextEncoderFiles(folder / "text_encoder", folder / "tokenizer")
    return encode_prompts(prompts, files, folder.parent / "cache", EncodingOptions(**settings), progress)


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
    fresh = encode(pipeline_folder, batch_size=2, progress=lambda *done: seen.append(done))
    torch.testing.assert_close(padded(fresh), oracle, rtol=0, atol=1e-6)
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    assert (len(fresh), fresh.text_dim, fresh.truncated) == (len(PROMPTS), TEXT_DIM, 1)

    forbid_encoder(monkeypatch)
    cached = encode(pipeline_folder, PROMPTS[::-1])
    assert torch.equal(padded(cached), padded(fresh).flip(0))
    assert cached.truncated == 1


def test_a_batch_is_padded_with_zeros_to_its_longest_prompt(pipeline_folder):
    embeds = encode(pipeline_folder, ["abcd", "", "ab"], dtype=torch.bfloat16)
    prompt_embeds, lengths = embeds.batch(torch.tensor([2, 1]), dtype=torch.float16)
    assert lengths.tolist() == [3, 1] and lengths.dtype == torch.int64
    assert prompt_embeds.shape == (2, 3, TEXT_DIM) and prompt_embeds.dtype == torch.float16
    assert prompt_embeds[1, 0].any() and not prompt_embeds[1, 1:].any()


def test_the_encoder_is_loaded_once_and_has_left_memory(pipeline_folder, monkeypatch):
    from transformers import UMT5EncoderModel

    load, loaded = UMT5EncoderModel.from_pretrained, []

    def load_and_note(*args, **settings):
        encoder, info = load(*args, **settings)
        loaded.append(weakref.ref(encoder))
        return encoder, info

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", load_and_note)
    embeds = encode(pipeline_folder, SHORT, batch_size=1)
    assert [encoder() for encoder in loaded] == [None] and len(embeds) == len(SHORT)


def test_only_the_prompts_the_cache_lacks_are_encoded(pipeline_folder):
    encode(pipeline_folder, ["one", "two"])
    seen = []
    embeds = encode(pipeline_folder, ["two", "three", "  three ", "one"], progress=lambda *done: seen.append(done))
    assert seen == [(1, 1)] and len(embeds) == 4


def test_many_small_shards_hold_the_same_values(pipeline_folder, oracle, monkeypatch):
    monkeypatch.setattr("wandistiller.wan.prompt_cache.SHARD_BYTES", 1)
    torch.testing.assert_close(padded(encode(pipeline_folder, SHORT)), oracle[: len(SHORT)], rtol=0, atol=1e-6)
    assert len(list(pipeline_folder.parent.glob("cache/*/*.safetensors"))) == len(SHORT)


@pytest.mark.parametrize("whole", [True, False])
def test_changed_weights_tokenizer_slots_or_dtype_miss_the_cache(pipeline_folder, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr("wandistiller.wan.text_encoder_files.READ_WHOLE_BYTES", 0)
    before = padded(encode(pipeline_folder, ["fox"]))
    edit_weights(pipeline_folder, lambda weights: weights["encoder.final_layer_norm.weight"].mul_(2))
    torch.testing.assert_close(padded(encode(pipeline_folder, ["fox"])), 2 * before)
    encode(pipeline_folder, ["fox"], text_max_length=2)
    encode(pipeline_folder, ["fox"], dtype=torch.bfloat16)
    config = pipeline_folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
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


def test_what_was_encoded_before_a_stop_is_kept(pipeline_folder, monkeypatch):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(pipeline_folder, ["longest", "middle", "end"], batch_size=1, progress=stop)
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


def write_config(folder: Path, **changes) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "text_encoder" / "model.safetensors").rename(folder / "outside.safetensors")
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder"), r"text_encoder: holds no config\.json"),
        (lambda f: write_config(f, model_type="t5"), "model_type='t5'"),
        (lambda f: write_config(f, d_model="wide"), "d_model='wide'"),
        (
            lambda f: (f / "text_encoder" / "config.json").write_text("{"),
            r"config\.json: line 1, column 2: not valid JSON",
        ),
        (lambda f: (f / "text_encoder" / "model.safetensors").unlink(), "only safetensors weights are read"),
        (lambda f: truncate(f / "text_encoder" / "model.safetensors"), "not a whole safetensors file"),
        (lambda f: write_index(f, {"shared.weight": "../outside.safetensors"}), "names '../outside.safetensors'"),
        (lambda f: write_index(f, {"shared.weight": "gone.safetensors"}), r"names 'gone\.safetensors'"),
        (lambda f: write_index(f, ["a"]), "has no weight_map"),
        (lambda f: write_config(f, d_ff=48), "text encoder cannot be loaded"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer: holds no tokenizer\.json or spiece\.model"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
        (lambda f: edit_weights(f, lambda w: w["shared.weight"].zero_()), "all zeros"),
        (lambda f: edit_weights(f, lambda w: w["shared.weight"].fill_(torch.nan)), "not finite"),
        (lambda f: edit_weights(f, lambda w: w["encoder.final_layer_norm.weight"].fill_(torch.inf)), "not finite"),
        (lambda f: edit_weights(f, lambda w: w.pop("encoder.final_layer_norm.weight")), "lack 1 tensors"),
        (lambda f: edit_weights(f, lambda w: w.pop("shared.weight")), "lack|unlike shared"),
        (lambda f: (f.parent / "cache").write_text(""), "cache cannot be made"),
    ],
)
def test_an_unusable_encoder_tokenizer_or_cache_is_refused(pipeline_folder, spoil, said):
    spoil(pipeline_folder)
    with pytest.raises(UserError, match=said):
        encode(pipeline_folder, ["fox"])


def test_an_embedding_table_that_transformers_left_zero_is_refused(pipeline_folder, monkeypatch):
    from transformers import UMT5EncoderModel

    load = UMT5EncoderModel.from_pretrained

    def load_with_the_regression(*args, **settings):
        encoder, info = load(*args, **settings)
        encoder.encoder.embed_tokens.weight = torch.nn.Parameter(torch.zeros_like(encoder.shared.weight))
        return encoder, info

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", load_with_the_regression)
    with pytest.raises(UserError, match="all zeros"):
        encode(pipeline_folder, ["fox"])


def test_a_tokenizer_of_another_model_is_refused(pipeline_folder):
    edit_weights(pipeline_folder, lambda w: w.update({"shared.weight": w["shared.weight"][:9].clone()}))
    write_config(pipeline_folder, vocab_size=9)
    with pytest.raises(UserError, match="knows 9 tokens"):
        encode(pipeline_folder, ["fox"])


@pytest.mark.parametrize("settings", [{"text_max_length": 0}, {"batch_size": 0}])
def test_settings_that_cannot_work_are_refused(pipeline_folder, settings):
    with pytest.raises(UserError, match="at least 1"):
        encode(pipeline_folder, ["fox"], **settings)


def test_mock_embeddings_depend_on_the_prompt_alone():
    embeds = mock_prompt_embeds(["a red fox", "", "w " * 20], TEXT_DIM, text_max_length=8)
    prompt_embeds, lengths = embeds.batch([0, 1, 2])
    assert lengths.tolist() == [4, 1, 8] and embeds.truncated == 1
    again, _ = mock_prompt_embeds(["other", "a red fox"], TEXT_DIM).batch([1])
    assert torch.equal(again[0], prompt_embeds[0, :4])
    assert not torch.equal(prompt_embeds[0, 0], prompt_embeds[1, 0])
