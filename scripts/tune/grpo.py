"""Reinforcement of a Llava folder with TRL's GRPO: it answers each question several times, exact matches are rewarded.

    python scripts/tune/grpo.py --model out/llava --output out/llava_grpo \\
        --data dataset/data/sft.jsonl --held_out dataset/data/held_out.jsonl

For a model that is often right, but not yet always. Where all answers of a group are alike nothing is learnt, so only
questions are taken on which its own answers, sampled before training, are sometimes right and sometimes wrong.
"""

from collections.abc import Sequence

from dataset.exam.questions import Question
from dataset.options import ReadOptions
from model.command_line import CommandLine
from model.inference.answerer import Answerer
from model.messages import UserError
from scripts.tune.curve import Curve
from scripts.tune.ending import Exam, curve_of, tune
from scripts.tune.packages import import_trl
from scripts.tune.pairs import sampled_answers
from scripts.tune.rows import read_picked, to_messages, to_rows
from scripts.tune.start import Start, add_tune_flags


def row(question: Question) -> dict:
    prompt, pictures = to_messages(question.sample.messages[:-1]), question.sample.open_pictures()
    return {"prompt": prompt, "images": pictures, "truth": question.truth}


def undecided(questions: Sequence[Question], answerer: Answerer, seed: int) -> list[Question]:
    """Those that the model answers rightly and wrongly. Raises UserError where there is none."""
    sampled = zip(questions, sampled_answers(questions, answerer, seed), strict=True)
    kept = [question for question, answers in sampled if len({answer == question.truth for answer in answers}) == 2]
    if not kept:
        raise UserError(
            f"of {len(questions):,} questions the model answers none sometimes rightly and sometimes wrongly: there is "
            "nothing to reward. Give more --questions, or tune with scripts/tune/sft.py first"
        )
    print(f"{len(kept):,} of {len(questions):,} questions are undecided", flush=True)
    return kept


def exact_match(completions: list[list[dict]], truth: list[str], **_: object) -> list[float]:
    """The reward of each answer: 1 where it is the true one to the letter."""
    return [float(turns[0]["content"].strip() == right) for turns, right in zip(completions, truth, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_tune_flags(parser, steps=20, batch_size=128, learning_rate=1e-4)
    parser.add_argument("--questions", type=int, default=700, help="of --data, to look for undecided ones among")
    parser.add_argument("--group", type=int, default=8, help="answers to one question, of the rows of a step")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="of an answer")
    options = parser.parse_args(arguments)
    try:
        if options.group < 2 or options.batch_size % options.group:
            raise UserError(f"--group {options.group} must be 2 or more, and go into --batch_size {options.batch_size}")
        trl = import_trl()
        start, exam = Start.from_flags(options), Exam.from_flags(options)
        picked = read_picked(options.data, ReadOptions.from_flags(options), options.questions, options.seed)
        questions = undecided(picked, Answerer.from_weight(options.model), options.seed)
        trainer = trl.GRPOTrainer(
            start.model,
            exact_match,
            trl.GRPOConfig(
                **start.settings, num_generations=options.group, max_completion_length=options.max_new_tokens
            ),
            to_rows(questions, row),
            processing_class=start.processor,
            callbacks=[Curve(curve_of(options.output))],
        )
        tune(trainer, options, {"exact match": exam.exact_match})
    except (UserError, OSError) as error:
        raise SystemExit(f"grpo: {error}") from error


if __name__ == "__main__":
    main()
