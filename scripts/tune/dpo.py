"""Direct preference optimization of a Llava folder with TRL: true answers against likely false ones, from our data.

    python scripts/tune/dpo.py --model out/llava --output out/llava_dpo \\
        --data dataset/data/sft.jsonl --held_out dataset/data/held_out.jsonl

scripts/tune/pairs.py makes the pairs: those to learn from out of --data, those to measure with out of --held_out.
"""

from dataset.options import ReadOptions
from model.command_line import CommandLine
from model.inference.answerer import Answerer
from model.messages import UserError
from scripts.tune.curve import Curve
from scripts.tune.ending import Exam, curve_of, tune
from scripts.tune.packages import import_trl
from scripts.tune.pairs import SOURCES, make_pairs, preference
from scripts.tune.rows import read_picked, to_rows
from scripts.tune.start import Start, add_tune_flags


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add_tune_flags(parser, steps=40, batch_size=16, learning_rate=1e-4)
    parser.add_argument(
        "--questions", type=int, default=800, help="of --data, picked at random, that pairs are made of"
    )
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=["own"], help="of the false answers")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the start is held on to")
    options = parser.parse_args(arguments)
    try:
        trl = import_trl()
        start, exam = Start.from_flags(options), Exam.from_flags(options)
        answerer = Answerer.from_weight(options.model)
        questions = read_picked(options.data, ReadOptions.from_flags(options), options.questions, options.seed)
        pairs = make_pairs(questions, answerer, options.seed, options.sources)
        held_out = make_pairs(exam.questions, answerer, options.seed, options.sources)
        trainer = trl.DPOTrainer(
            start.model,
            args=trl.DPOConfig(**start.settings, beta=options.beta, max_length=None),
            train_dataset=to_rows(pairs, lambda pair: pair.row(start.processor)),
            processing_class=start.processor,
            callbacks=[Curve(curve_of(options.output))],
        )
        measures = {"exact match": exam.exact_match, "preference": lambda folder: preference(folder, held_out)}
        tune(trainer, options, measures)
    except (UserError, OSError) as error:
        raise SystemExit(f"dpo: {error}") from error


if __name__ == "__main__":
    main()
