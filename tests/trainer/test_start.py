"""What a run takes from the weights that it starts from: all that they say of their decoder, under the flags."""

import dataclasses
from pathlib import Path

import pytest
import torch

from helpers.bases import save_base
from helpers.models import SIZES
from helpers.runs import assert_bit_equal, run_until, tiny, watched_run, weights_of, write_texts
from model.config import MiniMindConfig
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from model.weights import decoder_arguments, load_model, read_sizes, save_weights
from trainer import build, stage
from trainer.checkpoint import saver
from trainer.checkpoint.files import checkpoints_in, read_manifest
from trainer.checkpoint.resume import last_manifest
from trainer.config import StageConfig, names_weights
from trainer.train_llm import LLM
from trainer.train_sft_vlm import SFT_VLM

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
OTHER = {
    "rope_parameters": YARN, "rms_norm_eps": 1e-3, "router_aux_loss_coef": 0.5, "intermediate_size": 48,
    "vocab_size": 6500, "tie_word_embeddings": False, "max_position_embeddings": 64, "dropout": 0.25, "use_moe": True,
    "num_experts": 3, "num_experts_per_tok": 1,
}  # fmt: skip


def decoder(**changes) -> MiniMindForCausalLM:
    torch.manual_seed(1)
    return MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **changes}))


def decoder_of(path: Path) -> dict:
    return decoder_arguments(read_sizes(path))


@pytest.fixture
def starts_from(data_folder, tower_folder):
    """starts_from(model, stage): a tiny run of texts that starts from this model, though it knows no language yet."""

    def configure(model: MiniMindForCausalLM, of: StageConfig = LLM, **changes) -> StageConfig:
        path = data_folder / "start.safetensors"
        save_weights(model, path)
        settings = {"data_path": str(write_texts(data_folder)), "from_weight": str(path), **dict.fromkeys(SIZES, 0)}
        return tiny(of, data_folder, tower_folder, **{**settings, **changes})

    return configure


@pytest.mark.parametrize("of", [LLM, SFT_VLM], ids=lambda of: of.name)
def test_all_that_the_file_says_holds_and_is_saved_again(of, starts_from, monkeypatch, capsys):
    config = starts_from(decoder(**OTHER), of)
    before, model = watched_run(config, monkeypatch)
    expected = decoder_of(Path(config.from_weight))
    assert {name: expected[name] for name in OTHER} == OTHER
    assert decoder_arguments(model.config.to_dict()) == expected == decoder_of(build.with_sizes(config).weight_path)
    assert " where " not in capsys.readouterr().out
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])  # a head of its own learns with its decoder


def test_flags_win_and_the_difference_is_said(starts_from, monkeypatch, capsys):
    config = starts_from(decoder(**OTHER), dropout=0.0, num_experts_per_tok=2, num_experts=3)
    model = build.build_model(build.with_sizes(config), load_tokenizer())
    assert (model.config.dropout, model.config.num_experts_per_tok, model.config.rms_norm_eps) == (0.0, 2, 1e-3)
    said = [line for line in capsys.readouterr().out.splitlines() if " where " in line]
    path = config.from_weight
    assert said == [f"--num_experts_per_tok 2 where {path} says 1", f"--dropout 0.0 where {path} says 0.25"]


def test_without_a_file_the_decoder_is_minimind_s(starts_from):
    config = build.with_sizes(dataclasses.replace(starts_from(decoder()), from_weight="none"))
    assert (config.dropout, config.hidden_size) == (0.0, 512)


def test_resumed_run_builds_the_same_decoder_whatever_the_file_says_now(starts_from, monkeypatch, capsys):
    changes = {"rms_norm_eps": 1e-3, "rope_parameters": YARN, "dropout": 0.25}
    settings = {"batch_size": 4, "save_interval": 2}
    config = starts_from(decoder(**changes), **settings)
    unbroken = dataclasses.replace(config, save_dir=str(Path(config.save_dir) / "unbroken"))
    stage.run_stage(unbroken)
    run_until(config, 3, monkeypatch)
    save_weights(decoder(**{**changes, "rms_norm_eps": 1e-6}), config.from_weight)
    capsys.readouterr()
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    said = capsys.readouterr().out
    assert f"rms_norm_eps 0.001 as in this run's checkpoints, where {config.from_weight} says 1e-06" in said
    assert said.count(" where ") == 1
    ours, theirs = (build.with_sizes(run) for run in (config, unbroken))
    assert_bit_equal(weights_of(ours), weights_of(theirs))
    assert decoder_of(ours.weight_path)["rms_norm_eps"] == 1e-3


def test_rope_theta_is_replaced_said_and_recorded(starts_from, capsys):
    """What scales it stays; positions grow with the rows; the start file's probe holds though the angles are others."""
    first = starts_from(decoder(rope_parameters=YARN, max_position_embeddings=64))
    stage.run_stage(first)
    assert "--rope_theta" not in capsys.readouterr().out
    start = build.with_sizes(first).weight_path
    config = dataclasses.replace(first, from_weight=str(start), name="longer", rope_theta=5e5, max_seq_len=128)
    stage.run_stage(config)
    said = capsys.readouterr().out
    assert f"--rope_theta 500000 where {start} says 10000: the new one is kept" in said
    assert "--max_seq_len 128 where there were 64 positions: now there are as many" in said
    saved = decoder_of(build.with_sizes(config).weight_path)
    assert saved["rope_parameters"] == {**YARN, "rope_theta": 5e5} and saved["max_position_embeddings"] == 128
    slowed = load_model(build.with_sizes(config).weight_path).model.rotary.frequencies[1]  # by YaRN, four times
    assert float(slowed) == pytest.approx(5e5**-0.25 / 4, rel=1e-5)


def test_yarn_factor_is_said_recorded_and_read_by(starts_from, capsys):
    """Trained on rows of 64, read up to four times as far; the next stage keeps both."""
    first = starts_from(decoder(rope_theta=1e4, max_position_embeddings=64))
    config = dataclasses.replace(first, yarn_factor=4.0, max_seq_len=64)
    stage.run_stage(config)
    assert "--yarn_factor 4 on rows of 64: 256 positions" in capsys.readouterr().out
    path = build.with_sizes(config).weight_path
    saved = decoder_of(path)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert saved["rope_parameters"] == yarn and saved["max_position_embeddings"] == 256
    later = dataclasses.replace(first, from_weight=str(path), name="later", max_seq_len=64)
    stage.run_stage(later)
    assert decoder_of(build.with_sizes(later).weight_path)["rope_parameters"] == yarn
    both = dataclasses.replace(config, from_weight=str(path), name="both", rope_theta=5e5, yarn_factor=2.0)
    built = build.build_model(build.with_sizes(both), load_tokenizer()).config
    assert built.rope_parameters == {**yarn, "rope_theta": 5e5, "factor": 2.0} and built.max_position_embeddings == 128


def test_less_than_one_is_no_factor(starts_from):
    with pytest.raises(UserError, match="0.5 would shorten what can be read"):
        build.decoder_settings(dataclasses.replace(starts_from(decoder()), yarn_factor=0.5))


def test_rope_theta_without_weights_to_start_from(starts_from):
    config = dataclasses.replace(starts_from(decoder()), from_weight="none", rope_theta=2e5)
    built = build.build_model(build.with_sizes(config), load_tokenizer()).config
    assert built.rope_parameters == {"rope_type": "default", "rope_theta": 2e5}


def test_run_goes_on_with_its_theta_and_with_no_other(starts_from, monkeypatch, capsys):
    config = starts_from(decoder(), batch_size=4, save_interval=2, rope_theta=5e5)
    unbroken = dataclasses.replace(config, save_dir=str(Path(config.save_dir) / "unbroken"))
    stage.run_stage(unbroken)
    run_until(config, 3, monkeypatch)
    for theta, reason in ((1e6, "500000.0, found 1000000.0"), (0.0, "500000.0, found nothing")):
        with pytest.raises(SystemExit, match=f"--rope_theta: expected {reason}"):
            stage.run_stage(dataclasses.replace(config, from_resume=1, rope_theta=theta))
    capsys.readouterr()
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    assert " where " not in capsys.readouterr().out
    ours, theirs = (build.with_sizes(run) for run in (config, unbroken))
    assert_bit_equal(weights_of(ours), weights_of(theirs))


def test_checkpoint_of_an_older_version_goes_on_with_what_it_was_built_from(starts_from, monkeypatch):
    """It kept the file's sizes alone, and its manifest says nothing of the rest."""
    config = starts_from(decoder(rope_theta=1e4, dropout=0.25), batch_size=4, save_interval=2, **SIZES)
    whole = saver.take_snapshot
    with monkeypatch.context() as patch:
        patch.setattr(build, "start_settings", lambda config: {})
        patch.setattr(saver, "take_snapshot", lambda model, optimizer, contents, facts, keep: whole(
            model, optimizer, contents, {name: fact for name, fact in facts.items() if name != "decoder"}, keep
        ))  # fmt: skip
        run_until(config, 3, monkeypatch)
    (checkpoint,) = checkpoints_in(config.run_dir / "checkpoints")
    assert "decoder" not in read_manifest(checkpoint)
    assert build.with_sizes(config).dropout == 0.25  # of a run that starts anew
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    assert decoder_of(config.weight_path)["rope_parameters"]["rope_theta"] == 1e6
    assert decoder_of(config.weight_path)["dropout"] == 0.0


def test_settings_are_read_past_a_damaged_checkpoint(starts_from, monkeypatch):
    config = starts_from(decoder(rms_norm_eps=1e-3), batch_size=4, save_interval=1)
    run_until(config, 3, monkeypatch)
    config = dataclasses.replace(build.with_sizes(config), from_resume=1)
    assert last_manifest(dataclasses.replace(config, from_resume=0)) is None
    newest = checkpoints_in(config.run_dir / "checkpoints")[-1]
    (newest / "manifest.json").write_text("{")
    assert last_manifest(config)["decoder"]["rms_norm_eps"] == 1e-3


def test_heads_of_a_pth_are_those_of_the_flag(starts_from, tmp_path):
    """Its tensors tell the keys' size, and the number of their heads follows from that of the queries'."""
    model = decoder(num_key_value_heads=1, intermediate_size=48)
    torch.save(model.state_dict(), tmp_path / "mini.pth")
    config = starts_from(model, from_weight=str(tmp_path / "mini.pth"), num_attention_heads=4)
    built = build.build_model(build.with_sizes(config), load_tokenizer()).config
    assert (built.num_attention_heads, built.num_key_value_heads, built.intermediate_size) == (4, 1, 48)


def test_tokenizer_with_more_tokens_than_the_weights_know_is_refused():
    with pytest.raises(ValueError, match="6400 tokens and the weights know 300: .*beside them"):
        VLMProcessor.for_config(MiniMindConfig(**SIZES, vocab_size=300))


@pytest.mark.parametrize("name", ["llama attention_bias", "qwen3", "qwen3_moe"])
def test_a_base_of_others_is_started_from_and_saved_as_ours(name, data_folder, tower_folder, monkeypatch, tmp_path):
    """Its sizes, its biases and norms, its weights; two layers at the ends and the projector learn."""
    theirs = save_base(name, tmp_path, vocabulary=6400)
    load_tokenizer().save_pretrained(tmp_path)
    open_sizes = dict.fromkeys(SIZES, 0)
    learning = {"trainable": ("projector", "first_layer", "last_layer"), "optimizer": "muon", "epochs": 1}
    config = tiny(SFT_VLM, data_folder, tower_folder, from_weight=str(tmp_path), **learning, **open_sizes)
    before, model = watched_run(config, monkeypatch)
    embeddings = theirs.model.embed_tokens.weight
    assert torch.equal(before["model.embed_tokens.weight"], embeddings)
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert all(any(part in key for part in ("vision_proj", "layers.0.", "layers.1.")) for key in moved)
    assert {"model.layers.0.self_attn.q_proj.weight", "vision_proj.vision_proj.0.weight"} <= set(moved)
    weights = Path(config.save_dir) / f"sft_vlm_32{'_moe' if 'moe' in name else ''}.safetensors"
    again = load_model(weights)
    told = decoder_of(tmp_path)
    assert {setting: decoder_of(weights).get(setting) for setting in told} == told
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_what_is_a_path_and_what_a_stage_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("base", "llm"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    paths = ("llm_512.safetensors", "a.pth", "a.gguf", "base", str(tmp_path / "base"), str(tmp_path / "llm"))
    assert [name for name in (*paths, "llm", "none", "sft_vlm") if names_weights(name)] == list(paths)
