"""Train the shipped tokenizer: byte-level BPE, 6400 entries, `@` never merged. Needs `pip install wordfreq jieba`.

    python scripts/assets/train_tokenizer.py --output model

Sources: wordfreq's English and Chinese word lists weighted by frequency (its licence: Apache-2.0, data CC BY-SA 4.0)
and the words of Emoji World. Whole words are fed, never sentences, so that a name has the same tokens everywhere.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset import emoji_words, emoji_world
from model.command_line import CommandLine
from model.config import END_ID, END_OF_TEXT_ID, IMAGE_TOKEN, IMAGE_TOKEN_ID, START_ID
from model.files import ROOT

SHIPPED = ROOT / "model"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PUNCTUATION = "，。？！、：；（）《》“”"
SAMPLES = {
    "en": "The quick brown fox jumps over the lazy dog while the children are looking at the pictures in the museum.",
    "zh": "今天天气很好，我们一起去公园看花，孩子们在湖边画画，大人们坐在树下聊天喝茶。",
}


def weighted_words(name_count: int = 1500) -> Iterator[str]:
    """Words repeated by frequency: wordfreq's lists, and every word of Emoji World `name_count` times."""
    import wordfreq

    for language, per_million in (("en", 1.0), ("zh", 3.0)):  # a Chinese character is three bytes to be merged
        for word in wordfreq.top_n_list(language, 30000):
            count = max(1, round(wordfreq.word_frequency(word, language) * 1e6 * per_million))
            yield from ([" " + word, word.capitalize()] if language == "en" else [word]) * min(count, 4000)
    for mark in PUNCTUATION:
        yield from [mark] * 4000
    for word in emoji_world_words():
        yield from [word] * name_count


def emoji_world_words() -> set[str]:
    """Names, places, colours, numbers, the fixed parts of questions; English ones with and without a space before."""
    words = {concept.zh for concept in emoji_world.concepts()}
    english = {part for concept in emoji_world.concepts() for part in concept.en.split()}
    for table in (emoji_words.PLACES, emoji_words.COLOURS, emoji_words.NUMBERS, emoji_words.YES_NO):
        english.update(part for phrase in table["en"] for part in phrase.split())
        words.update(table["zh"])
    english.update(number.capitalize() for number in emoji_words.NUMBERS["en"])  # they open captions
    for kind in emoji_words.KINDS:  # the first two ways of asking, whole in Chinese; the others share their words
        for template in emoji_words.QUESTIONS["zh"][kind][:2]:
            words.update(part.strip("？") for part in template.split("{}"))
        for template in emoji_words.QUESTIONS["en"][kind][:2]:
            english.update(part.strip("?") for part in template.replace("{}", "").split())
    words.update(english, (" " + word for word in english))
    return words - {""}


def train(vocab_size: int = 6400) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(IMAGE_TOKEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(weighted_words(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[START_ID],
        eos_token=SPECIAL_TOKENS[END_ID],
        pad_token=SPECIAL_TOKENS[END_OF_TEXT_ID],
        unk_token=SPECIAL_TOKENS[END_OF_TEXT_ID],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    if fast.convert_tokens_to_ids(IMAGE_TOKEN) != IMAGE_TOKEN_ID or len(fast) != vocab_size:
        raise RuntimeError(f"'{IMAGE_TOKEN}' is {fast.convert_tokens_to_ids(IMAGE_TOKEN)}, entries {len(fast)}")
    return fast


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=SHIPPED, help="folder of tokenizer.json")
    options = parser.parse_args(arguments)
    tokenizer = train()
    tokenizer.save_pretrained(options.output)
    for language, text in SAMPLES.items():
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        print(f"{language}: {len(text) / tokens:.2f} characters per token")
    names = emoji_world.concepts()
    for language in emoji_world.LANGUAGES:
        counts = [len(tokenizer(getattr(concept, language))["input_ids"]) for concept in names]
        print(f"names in {language}: {sum(counts) / len(counts):.2f} tokens each")


if __name__ == "__main__":
    main()
