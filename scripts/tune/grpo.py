"""Reinforcement of a Llava folder with TRL's GRPO: it answers each question several times, exact matches are rewarded.

    python scripts/tune/grpo.py --model out/llava --output out/llava_grpo \\
        --data dataset/data/sft.jsonl --held_out dataset/data/held_out.jsonl

For a model that is often right, but not yet always: where all answers of a group are alike, nothing is learnt.
"""

from dataset.exam.questions import Question
from dataset.options import ReadOptions
from model.command_line import CommandLine
from model.messages import UserError
from scripts.tune.curve import Curve
from scripts.tune.ending import Exam, curve_of, tune
from scripts.tune.packages import import_trl
from scripts.tune.rows import read_picked, to_messages, to_rows
from scripts.tune.start import Start, add_tune_flags


def row(question: Question) -> dict:
    prompt, pictures = to_messages(question.sample.messages[:-1]), question.sample.open_pictures()
    return {"prompt": prompt, "images": pictures, "truth": question.truth}


def exact_match(completions: list[list[dict]], truth: list[str], **_: object) -> list[float]:
    """The reward of each answer: 1 where it is the true one to the letter."""
    return [float(turns[0]["content"].strip() == right) for turns, right in zip(completions, truth, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_tune_flags(parser, steps=100, batch_size=64, learning_rate=5e-5)
    parser.add_argument("--group", type=int, default=8, help="answers to one question, of the rows of a step")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="of an answer")
    options = parser.parse_args(arguments)
    try:
        if options.group < 2 or options.batch_size % options.group:
            raise UserError(f"--group {options.group} must be 2 or more, and go into --batch_size {options.batch_size}")
        trl = import_trl()
        start, exam = Start.from_flags(options), Exam.from_flags(options)
        count = options.steps * options.batch_size // options.group
        questions = read_picked(options.data, ReadOptions.from_flags(options), count, options.seed)
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
