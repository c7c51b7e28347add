"""What transformers calls a processor: chat messages with pictures to the inputs of MiniMindVLM.generate()."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from model.config import IMAGE_TOKEN_ID
from model.processing import IMAGE_TAG, Rendered, SampleError, VLMProcessor, open_picture
from model.text import counted

# pipeline("image-text-to-text") knows its models by their names and complains about others, though they work
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("minimind_vlm", "MiniMindVLM")
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("minimind_vlm_without_vision", "MiniMindVLMWithoutVision")
PICTURE_KEYS = ("image", "path", "url", "base64")  # where a message's part keeps its picture


class MiniMindVLMProcessor(ProcessorMixin):
    """VLMProcessor under the names that transformers' users and pipelines call. Batches are padded on the left."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, image_tokens: int = 196, image_size: int = 224, chat_template=None, **_ignored):
        self.image_tokens, self.image_size = image_tokens, image_size
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def renderer(self) -> VLMProcessor:
        return VLMProcessor(self.tokenizer, self.image_tokens, self.image_size)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "image_mask", "pixel_values"]

    def apply_chat_template(
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        **options,
    ) -> str | list[str] | torch.Tensor | BatchFeature:
        """Messages, or a list of conversations, to model inputs; with tokenize=False to the text alone.

        A part {"type": "image"} keeps its picture under "image" (PIL), "path", "url" or "base64". The text of a part
        is taken literally: an <image> or <|im_end|> that a person typed stays text.

        Raises:
            ValueError: messages that cannot be rendered, pictures that cannot be read.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tokenize=False, **options,
            )  # fmt: skip
        if return_tensors not in ("pt", "auto", None):
            raise ValueError(f"return_tensors {return_tensors!r} is not offered: leave it out, tensors are PyTorch's")
        renderer, rows = self.renderer, []
        for messages in conversation if isinstance(conversation[0], (list, tuple)) else [conversation]:
            rendered = renderer.render(messages, add_generation_prompt=add_generation_prompt)
            if continue_final_message:
                rendered.truncate(len(rendered.input_ids) - 1 - len(renderer.new_line))
            rows.append((rendered, pictures_of(messages)))
        inputs = self._inputs(rows)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(self, images=None, text: str | Sequence[str] = "", **_options) -> BatchFeature:
        """Texts with <image> where a picture goes, control tokens included, and the pictures in their order."""
        rows, pictures = [], flatten(images)
        for prompt in [text] if isinstance(text, str) else text:
            rendered = Rendered()
            for number, piece in enumerate(prompt.split(IMAGE_TAG)):
                if number:
                    rendered.extend([IMAGE_TOKEN_ID] * self.image_tokens, image=True)
                rendered.extend(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
            count = prompt.count(IMAGE_TAG)
            rows.append((rendered, pictures[:count]))
            pictures = pictures[count:]
        if pictures:
            raise SampleError(
                f"{counted(len(pictures), 'pictures')} too many: put an {IMAGE_TAG} for each into the text"
            )
        return self._inputs(rows)

    def _inputs(self, rows: Sequence[tuple[Rendered, list]]) -> BatchFeature:
        read = [(rendered, [read_picture(picture) for picture in pictures]) for rendered, pictures in rows]
        return BatchFeature(self.renderer.prompt_inputs(read))


def pictures_of(messages: Sequence[dict]) -> list:
    """The pictures of a conversation in order, as its parts name them."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    found = []
    for part in parts:
        if part["type"] == "image":
            source = next((part[key] for key in PICTURE_KEYS if part.get(key) is not None), None)
            if source is None:
                raise SampleError(f"an image part holds no picture: give it one of {', '.join(PICTURE_KEYS)}")
            found.append(source)
    return found


def read_picture(source: str | Path | Image.Image) -> Image.Image:
    """A file or PIL picture as in training; what must be fetched or decoded first is left to transformers."""
    if isinstance(source, str) and not Path(source[:1000]).is_file():
        source = load_image(source)  # http, base64, data:
    return open_picture(source)


def flatten(images: object) -> list:
    """One picture, a list, or lists of lists, to a list."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in flatten(entry)]
    return [images]
