"""Each recipe as a person runs it, tiny: what trains, what comes out, and what is refused before training."""

import json
import sys

import pytest

pytest.importorskip("trl", reason="tuning with TRL is tried by make test-trl")

import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dataset.exam.questions import read_questions
from helpers.data import make_picture
from helpers.exports import export, make_seeing, prove_here
from model.inference.answerer import Answerer, user_turn
from scripts import convert_vlm
from scripts.tune import dpo, grpo, sft

# TRL 1.16 calls things of transformers by names that 5.24 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
RECIPES = {
    "sft": (sft.main, []),
    "dpo": (dpo.main, ["--questions", "12", "--sources", "another", "order", "own"]),
    "grpo": (grpo.main, ["--group", "4", "--max_new_tokens", "4", "--questions", "12"]),
}


def run(name: str, folder, data, output, *flags: str) -> None:
    main, own = RECIPES[name]
    places = ["--model", str(folder), "--data", str(data), "--held_out", str(data), "--output", str(output)]
    sizes = ["--held_out_limit", "6", "--steps", "2", "--batch_size", "4", "--learning_rate", "1e-3"]
    main([*places, *sizes, *own, *flags])


def changed(before, after) -> set[str]:
    """Which parts differ between the tensors of two folders."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert set(old) == set(new) and {value.dtype for value in new.values()} == {torch.float32}
    return {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_tuned_folder_is_one_like_the_one_it_came_from(name, folder, data, tmp_path, capsys):
    output = tmp_path / "tuned"
    run(name, folder, data, output)
    assert changed(folder, output) == {"multi_modal_projector", "language_model"}  # the tower is frozen
    kept = {path.name for path in folder.iterdir()}
    assert {path.name for path in output.iterdir()} == kept | {"conversion.json"}
    for file in kept - {"model.safetensors"}:
        assert (output / file).read_bytes() == (folder / file).read_bytes()
    LlavaForConditionalGeneration.from_pretrained(output), AutoProcessor.from_pretrained(output)
    answerer = Answerer.from_weight(output)
    assert answerer.batch([answerer.prompt([user_turn("What?", 0)])])[0].new_tokens
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("before: exact match 0.")] and len(said) >= 4
    assert [line for line in said if line.startswith("after:  exact match 0.") and "of 6 questions" in line]
    assert said[-1].endswith(f"scripts/convert_vlm.py --from llava --weight {output} --output out/tuned.safetensors")
    lines = [json.loads(line) for line in (tmp_path / "tuned.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]  # the last one sums up
    norms = [lines[0][f"grad_norm_{part}"] for part in ("projector", "decoder")]
    assert "grad_norm_tower" not in lines[0] and max(norms) < 100 * min(norms)


def test_what_was_tuned_comes_home(folder, data, tmp_path, monkeypatch):
    run("sft", folder, data, tmp_path / "tuned")
    prove_here(monkeypatch)
    flags = ["--from", "llava", "--weight", str(tmp_path / "tuned"), "--output", str(tmp_path / "home.safetensors")]
    found = convert_vlm.come_home(convert_vlm.parse_arguments(flags))
    assert found["largest_logit_difference"] < 1e-4
    question = "What is it?"
    answers = []
    for path in ("tuned", "home.safetensors"):
        answerer = Answerer.from_weight(tmp_path / path, dtype="float32")
        (answer,) = answerer.batch([answerer.prompt([user_turn(question, 1)], [make_picture(0)])])
        answers.append(answer.token_ids)
    assert answers[0] == answers[1]


def test_the_tower_is_trained_where_it_is_asked_for(folder, data, tmp_path):
    run("sft", folder, data, tmp_path / "tuned", "--train_tower")
    assert changed(folder, tmp_path / "tuned") == {"vision_tower", "multi_modal_projector", "language_model"}
    first = json.loads((tmp_path / "tuned.jsonl").read_text().splitlines()[0])
    assert all(first[f"grad_norm_{part}"] > 0 for part in ("tower", "projector", "decoder"))


def test_grpo_rewards_exact_matches(folder, data, tmp_path, monkeypatch, capsys):
    """With a reward that half of the answers get, as random weights are never right."""
    assert grpo.exact_match([[{"content": " a cat"}], [{"content": "cat"}]], ["a cat", "a cat"]) == [1.0, 0.0]
    monkeypatch.setattr(grpo, "exact_match", lambda completions, truth, **_: [n % 2 for n in range(len(completions))])
    monkeypatch.setattr(grpo, "sampled_answers", lambda questions, *_: [[one.truth, "no"] for one in questions])
    run("grpo", folder, data, tmp_path / "tuned")
    assert changed(folder, tmp_path / "tuned") == {"multi_modal_projector", "language_model"}
    first = json.loads((tmp_path / "tuned.jsonl").read_text().splitlines()[0])
    assert first["reward"] == 0.5 and first["grad_norm_decoder"] > 0 and first["completions/mean_length"] > 0
    assert "after:  exact match" in capsys.readouterr().out


def test_grpo_takes_the_questions_that_are_undecided(data, folder, tmp_path, monkeypatch):
    questions = read_questions(data)
    given = [[q.truth, q.truth] if n % 3 == 0 else ["no", "no"] if n % 3 == 1 else ["no", q.truth] for n, q in
             enumerate(questions)]  # fmt: skip
    monkeypatch.setattr(grpo, "sampled_answers", lambda *_: given)
    assert grpo.undecided(questions, None, 0) == questions[2::3]
    monkeypatch.setattr(grpo, "sampled_answers", lambda questions, *_: [["no"]] * len(questions))
    with pytest.raises(SystemExit, match="there is nothing to reward"):
        run("grpo", folder, data, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_dpo_says_the_preference_before_and_after(folder, data, tmp_path, capsys):
    run("dpo", folder, data, tmp_path / "tuned")
    said = [line for line in capsys.readouterr().out.splitlines() if " preference " in line]
    assert [line.partition(":")[0] for line in said] == ["before", "after"]
    assert all("another " in line and "order " in line and "own " in line for line in said)


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--steps", "0"), "--steps, --batch_size and --learning_rate must be above 0"),
     (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"), (("--stpes", "3"), "did you mean --steps")],
)  # fmt: skip
def test_wrong_flags_are_refused(flags, words, folder, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("sft", folder, data, tmp_path / "tuned", *flags)
    assert words in f"{stopped.value} {capsys.readouterr().err}" and not (tmp_path / "tuned").exists()


def test_without_trl_a_line_says_how_to_get_it(folder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SystemExit, match="^sft: the package datasets is not installed: pip install -r requirements/trl"
    ):
        run("sft", folder, data, tmp_path / "tuned")


def test_groups_that_do_not_fill_a_step_are_refused(folder, data, tmp_path):
    with pytest.raises(SystemExit, match="--group 3 must be 2 or more, and go into --batch_size 4"):
        run("grpo", folder, data, tmp_path / "tuned", "--group", "3")


def test_folders_that_cannot_be_trained_are_refused(folder, data, tmp_path):
    decoder = export(make_seeing(), "llm", tmp_path / "llm")
    with pytest.raises(SystemExit, match="holds a model of type 'llama': a recipe tunes what --to llava writes"):
        run("sft", decoder, data, tmp_path / "tuned")
    with pytest.raises(SystemExit, match="is no model folder"):
        run("sft", tmp_path / "empty", data, tmp_path / "tuned")
    scaled = LlavaForConditionalGeneration.from_pretrained(folder)
    scaled.model.multi_modal_projector.linear_2.weight.data.fill_(2.0**41)
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(SystemExit, match="scaled for engines that only answer"):
        run("sft", tmp_path / "scaled", data, tmp_path / "tuned")


def test_what_no_recipe_wrote_is_not_replaced(folder, data, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is no converted model"):
        run("sft", folder, data, tmp_path / "tuned")
    assert not (tmp_path / "tuned.jsonl").exists()
