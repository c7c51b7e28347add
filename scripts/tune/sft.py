"""Supervised tuning of a Llava folder with TRL, from our data files: every answer of a conversation is learnt.

    python scripts/tune/sft.py --model out/llava --output out/llava_sft \\
        --data dataset/data/sft.jsonl --held_out dataset/data/held_out.jsonl
"""

from dataset.options import ReadOptions
from dataset.samples import Sample
from model.command_line import CommandLine
from model.messages import UserError
from scripts.tune.curve import Curve
from scripts.tune.ending import Exam, curve_of, tune
from scripts.tune.packages import import_trl
from scripts.tune.rows import read_talks, to_messages, to_rows
from scripts.tune.start import Start, add_tune_flags


def row(talk: Sample) -> dict:
    return {"messages": to_messages(talk.messages), "images": talk.open_pictures()}


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_tune_flags(parser, steps=100, batch_size=16, learning_rate=1e-5)
    options = parser.parse_args(arguments)
    try:
        trl = import_trl()
        start, exam = Start.from_flags(options), Exam.from_flags(options)
        talks = read_talks(
            options.data, ReadOptions.from_flags(options), options.steps * options.batch_size, options.seed
        )
        trainer = trl.SFTTrainer(
            start.model,
            # The marks of the chat template say what the assistant says: these labels are the stages' own, in every
            # turn. Without them TRL learns all of `messages`, the tokens of the pictures too; and of prompt and
            # completion it would learn the last answer alone, with the line break behind it that no model writes.
            trl.SFTConfig(**start.settings, assistant_only_loss=True, max_length=None),
            train_dataset=to_rows(talks, row),
            processing_class=start.processor,
            callbacks=[Curve(curve_of(options.output))],
        )
        tune(trainer, options, {"exact match": exam.exact_match})
    except (UserError, OSError) as error:
        raise SystemExit(f"sft: {error}") from error


if __name__ == "__main__":
    main()
