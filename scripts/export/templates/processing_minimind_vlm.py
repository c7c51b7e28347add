"""What transformers calls a processor: chat messages with pictures to the inputs of MiniMindVLM.generate()."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ImageTextToTextPipeline, PreTrainedTokenizerBase
from transformers.image_utils import load_image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from model.config import BICUBIC, IMAGE_TOKEN_ID
from model.messages import counted
from model.pictures import SampleError, open_picture
from model.processing import IMAGE_TAG, Piece, Rendered, VLMProcessor

# pipeline("image-text-to-text") knows its models by their names and complains about others, though they work
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("minimind_vlm", "MiniMindVLM")
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("minimind_vlm_without_vision", "MiniMindVLMWithoutVision")
PICTURE_KEYS = ("image", "path", "url", "base64")  # where a message's part keeps its picture

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
ACCEPTED = {  # options that say what is done anyway
    "return_tensors": ("pt", "auto"),
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "add_special_tokens": (True,),  # the tokenizer has none to add
    "return_attention_mask": (True,),
}


class MiniMindVLMProcessor(ProcessorMixin):
    """VLMProcessor under the names that transformers' users and pipelines call. Batches are padded on the left."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, tokenizer=None, image_tokens: int = 196, image_size: int = 224, image_token_id: int = IMAGE_TOKEN_ID,
        resample: int = BICUBIC, tiles: int = 0, chat_template=None, **_ignored,
    ):  # fmt: skip
        self.image_tokens, self.image_size, self.image_token_id = image_tokens, image_size, image_token_id
        self.resample, self.tiles = resample, tiles
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def renderer(self) -> VLMProcessor:
        return VLMProcessor(
            self.tokenizer, self.image_tokens, self.image_size, self.image_token_id, self.resample, self.tiles
        )

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
        return_assistant_tokens_mask: bool = False,
        **options,
    ) -> str | list[str] | torch.Tensor | BatchFeature:
        """Messages, or a list of conversations, to model inputs; with tokenize=False to the text alone.

        A part {"type": "image"} keeps its picture under "image" (see read_picture), "path", "url" or "base64". The text
        of a part is taken literally: an <image> or <|im_end|> that a person typed stays text.

        return_assistant_tokens_mask: with assistant_masks [batch, seq], 1 at what is to be learnt.
        options: truncation and max_length, here or in processor_kwargs; see length_limit.

        Raises:
            ValueError: messages that cannot be rendered, pictures that cannot be read, options that are not offered.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tokenize=False, **options,
            )  # fmt: skip
        if chat_template not in (None, self.chat_template):
            raise SampleError("chat_template is used with tokenize=False alone: ids are rendered as in training")
        limit = length_limit(self.tokenizer, {"return_tensors": return_tensors, **options})
        renderer, rows = self.renderer, []
        for messages in conversation if isinstance(conversation[0], (list, tuple)) else [conversation]:
            pictures = [read_picture(picture) for picture in pictures_of(messages)]
            rendered = renderer.render(messages, add_generation_prompt, self._headings(pictures))
            if continue_final_message:
                end = len(renderer.end.ids) + len(renderer.endings["assistant"].ids)
                rendered = rendered[:-end]  # without the end of the turn
            if add_generation_prompt and limit is not None and len(rendered) > limit:
                raise SampleError(
                    f"the prompt has {len(rendered)} tokens: cut to {limit} it would lose the opening of the "
                    "answer. Shorten the messages or raise max_length"
                )
            rows.append((rendered, pictures))
        inputs = self._inputs(rows, limit)
        if return_assistant_tokens_mask:  # padding stands on the left
            length = inputs["input_ids"].shape[1]
            masks = [[0] * (length - len(rendered)) + rendered.trained.tolist() for rendered, _ in rows]
            inputs["assistant_masks"] = torch.tensor(masks, dtype=torch.long)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(self, images=None, text: str | Sequence[str] = "", **options) -> BatchFeature:
        """Texts with <image> where a picture goes, control tokens included, and the pictures in their order.

        options: truncation and max_length; see length_limit.
        """
        limit = length_limit(self.tokenizer, options)
        rows, pictures = [], [read_picture(picture) for picture in flatten(images)]
        for prompt in [text] if isinstance(text, str) else text:
            pieces, headings = [], self._headings(pictures)
            for number, piece in enumerate(prompt.split(IMAGE_TAG)):
                if number:  # of places without a picture it is said below that they have none
                    pieces += self.renderer.spans(headings[number - 1] if number <= len(headings) else ("",))
                pieces.append(Piece(self.tokenizer(piece, add_special_tokens=False)["input_ids"]))
            count = prompt.count(IMAGE_TAG)
            rows.append((Rendered.of(pieces), pictures[:count]))
            pictures = pictures[count:]
        if pictures:
            raise SampleError(
                f"{counted(len(pictures), 'pictures')} too many: put an {IMAGE_TAG} for each into the text"
            )
        return self._inputs(rows, limit)

    def _inputs(self, rows: Sequence[tuple[Rendered, list]], limit: int | None) -> BatchFeature:
        if limit is not None and any(rendered.image_mask[limit:].any() for rendered, _ in rows):
            raise SampleError(f"cut to {limit} tokens a prompt would lose a part of a picture: raise max_length")
        return BatchFeature(self.renderer.prompt_inputs((rendered[:limit], pictures) for rendered, pictures in rows))

    def _headings(self, pictures: Sequence[Image.Image]) -> list[tuple[str, ...]]:
        """Of the views of each."""
        sight = self.renderer.sight
        return [sight.grid(*picture.size).headings for picture in pictures]


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


def length_limit(tokenizer: PreTrainedTokenizerBase, options: dict) -> int | None:
    """Tokens to which rows are cut at their end, as truncation and max_length ask for; None: not at all.

    Raises:
        SampleError: an option that would change the inputs and is not offered.
    """
    options = dict(options)
    for group in ("processor_kwargs", "text_kwargs"):
        options |= options.pop(group, None) or {}
    limit, truncation = options.pop("max_length", None), options.pop("truncation", None)
    for name, value in options.items():
        if value not in ACCEPTED.get(name, ()) and value not in (None, False, {}):
            raise SampleError(
                f"{name} {value!r:.60} is not offered: leave it out. Rows are padded on the left, tensors are "
                "PyTorch's, pictures are squeezed to a square as in training"
            )
    if truncation not in (None, False, True, "longest_first", "only_first", "do_not_truncate"):
        raise SampleError(f"truncation {truncation!r} is not offered: give True, and max_length")
    return (limit or tokenizer.model_max_length) if truncation not in (None, False, "do_not_truncate") else None


def read_picture(source: str | Path | Image.Image | np.ndarray | torch.Tensor) -> Image.Image:
    """A file, PIL picture or array as in training; what must be fetched or decoded first is left to transformers."""
    if isinstance(source, str) and not Path(source[:1000]).is_file():
        source = load_image(source)  # http, base64, data:
    return open_picture(drawn(source) if isinstance(source, (np.ndarray, torch.Tensor)) else source)


def drawn(values: np.ndarray | torch.Tensor) -> Image.Image:
    """An array [height, width], or with 1, 3 or 4 channels in front or behind, of 0..255 or of floats 0..1."""
    in_front = torch.is_tensor(values)  # where the colours are, if both could be
    if in_front:
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    array = values[..., None] if values.ndim == 2 else values
    if values.ndim == 3 and array.shape[0] in CHANNELS and (in_front or array.shape[-1] not in CHANNELS):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in CHANNELS or not array.size:
        raise SampleError(
            f"an array of shape {values.shape} is no picture: it needs height, width and 1, 3 or 4 colours"
        )
    top = 1 if array.dtype.kind == "f" else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= top):
        raise SampleError(f"an array of {array.dtype} holds {low} to {high}: give floats 0 to 1 or numbers 0 to 255, "
                          "not normalized")  # fmt: skip
    array = np.rint(array * 255 if top == 1 else array).astype(np.uint8)
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def flatten(images: object) -> list:
    """One picture, a list, lists of lists, or an array of several, to a list."""
    if images is None:
        return []
    several = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim > 3
    if several or isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in flatten(entry)]
    return [images]


class MiniMindVLMPipeline(ImageTextToTextPipeline):
    """image-text-to-text whose batches may hold rows with different numbers of pictures, or none.

    transformers puts tensors of one shape together, but any two lists side by side: so pictures travel in lists.
    """

    def preprocess(self, inputs: object = None, **options) -> BatchFeature:
        found = super().preprocess(inputs, **options)
        rows = zip(found.pop("pixel_values", ()), self._counts(found), strict=False)
        found["pictures"] = [picture for pictures, count in rows for picture in pictures[:count]]
        return found

    def _forward(self, model_inputs, **options) -> dict:
        pictures = flatten(model_inputs.pop("pictures"))
        if pictures:
            rows = torch.stack(pictures).split(self._counts(model_inputs))
            model_inputs["pixel_values"] = pad_sequence(rows, batch_first=True)
        return super()._forward(model_inputs, **options)

    def _counts(self, model_inputs) -> list[int]:
        return (model_inputs["image_mask"].sum(1) // self.processor.image_tokens).tolist()
