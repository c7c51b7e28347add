"""lmms-eval's model `minimind_vlm`: our engine behind the calls of that harness, batched.

    lmms-eval --model minimind_vlm --model_args pretrained=out/sft_vlm_192.safetensors --batch_size 48 \\
        --include_path out/judge/tasks --tasks emoji_world

The harness finds it by the entry point in pyproject.toml.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from model.inference.answerer import Answerer, Options, user_turn
from model.inference.likelihood import log_likelihoods
from model.inference.reader import Prompt
from model.processing import IMAGE_TAG
from model.progress import progress_over

MANIFEST = ModelManifest("minimind_vlm", simple_class_path=f"{__name__}.MiniMindVLM")


class MiniMindVLM(lmms):
    """A file of ours, or a folder as transformers saves it."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 48,
        device: str | None = "auto",
        dtype: str = "auto",
        vision_model: str | None = None,
        num_attention_heads: int | str = 8,
    ):
        """pretrained: as --weight of eval_vlm.py; the others too. Raises UserError as Answerer.from_weight does."""
        super().__init__()
        self.answerer = Answerer.from_weight(
            pretrained, vision_model, device or "auto", dtype, int(num_attention_heads)
        )
        self.batch_size = int(batch_size)
        self.first_prompts: dict[str, Prompt] = {}  # of each task, for those who want to see one

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = []
        for batch in self._batches(requests, "answers"):
            wishes = batch[0].args[1]
            for answer in self.answerer.batch([self._prompt(request) for request in batch], _sampling(wishes)):
                answers.append(_before(wishes.get("until") or [], answer.text))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Pairs of a loss and whether greedy sampling would say it.

        The loss is minus the sum of log p over the continuation's tokens and the one that ends the answer, as it is for
        llava_hf: this harness takes the smallest of several. It makes a string of whatever is no GenerationResult, and
        then cannot compare.
        """
        losses = []
        for batch in self._batches(requests, "likelihoods"):
            texts = [self._continuation(request) for request in batch]
            for found in log_likelihoods(
                self.answerer, [self._prompt(request) for request in batch], texts, with_end=True
            ):
                losses.append(GenerationResult((-found.total, found.greedy)))
        return losses

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("minimind_vlm answers tasks of one round: leave those of several out of --tasks")

    def prompt(self, text: str, pictures: Sequence[Image.Image]) -> Prompt:
        """The pictures stand where the text has <image>, or before all of it, as in training."""
        message = {"role": "user", "content": text}
        if text.count(IMAGE_TAG) != len(pictures):
            message = user_turn(text, len(pictures))
        return self.answerer.prompt([message], pictures)

    def first_prompt(self, task: str) -> str:
        """What the model read first of a task, with <image> for a picture's tokens."""
        prompt, text = self.first_prompts[task], ""
        processor = self.answerer.processor
        for is_picture, run in groupby(zip(prompt.image_mask, prompt.ids, strict=True), lambda pair: pair[0]):
            ids = [token for _, token in run]
            text += IMAGE_TAG * (len(ids) // processor.image_tokens) if is_picture else processor.tokenizer.decode(ids)
        return text

    def _batches(self, requests: list[Instance], what: str) -> Iterator[list[Instance]]:
        """In the order of the tasks, so that a picture that several questions are about is read once.

        A batch is of one task, whose requests all want the same sampling.
        """
        batches = []
        for _, of_task in groupby(requests, lambda request: request.args[-2]):
            of_task = list(of_task)
            batches += [of_task[start : start + self.batch_size] for start in range(0, len(of_task), self.batch_size)]
        yield from progress_over(batches, what, "batch")

    def _prompt(self, request: Instance) -> Prompt:
        """A request is (text, wishes or continuation, function that gives the pictures, number, task, split)."""
        text, _, doc_to_visual, _, task, _ = request.args
        prompt = self.prompt(text, doc_to_visual(self._doc(request)) or [])
        self.first_prompts.setdefault(task, prompt)
        return prompt

    def _continuation(self, request: Instance) -> str:
        given = request.args[1]
        return given if isinstance(given, str) else given(self._doc(request))

    def _doc(self, request: Instance) -> dict:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]


def _sampling(wishes: dict) -> Options:
    """What a task's generation_kwargs say; without a temperature always the likeliest token."""
    named = {"max_new_tokens": wishes.get("max_new_tokens"), "temperature": wishes.get("temperature")}
    if named["temperature"]:
        named |= {"top_p": wishes.get("top_p"), "top_k": wishes.get("top_k")}
    return Options(**{name: value for name, value in named.items() if value is not None})


def _before(ends: Sequence[str], text: str) -> str:
    """The text up to the first of the strings that a task wants it to end at."""
    for end in filter(None, [ends] if isinstance(ends, str) else ends):
        text = text.split(end)[0]
    return text
