"""Messages and pictures to model inputs: one renderer for training, evaluation, the demo and the score.

messages   [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "a cat"}]
text       <|im_start|>user\\n@@@ ... @@@\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\na cat<|im_end|>\\n
image_mask                     (196 true)
labels                                                                              a cat<|im_end|>
"""

import errno
import hashlib
import json
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerFast

from model.config import END_ID, END_OF_TEXT_ID, IGNORE_INDEX, IMAGE_TOKEN_ID, START_ID, MiniMindConfig, VLMConfig
from model.messages import UserError, counted
from model.model_minimind import positions_before

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
REMEMBERED_TEXTS = 65536
MAX_PIXELS = 25_000_000  # a picture of more is refused by its header, before it is decoded
DRAFT_SIDE = 1024  # pixels; a JPEG of more than MAX_PIXELS is decoded at a half to an eighth of its size, not smaller
MAX_SIDE, MAX_RATIO = 16384, 200  # pixels; the longer side to the shorter
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Not there, no file, or a decoder sent to a place before its start; other numbers are the disk's or the system's fault.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
# What Pillow's decoders raise over bytes that they did not expect.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError, struct.error,
                 LookupError, ArithmeticError, TypeError)  # fmt: skip


class SampleError(UserError):
    """A sample that cannot be used; the message says why, without saying where: the reader knows that.

    cure: for whoever reads data files; other tools say the reason alone, and a cure of their own.
    """

    def __init__(self, reason: str, cure: str = ""):
        self.reason = reason
        super().__init__(*filter(None, (reason, cure)))

    def __str__(self) -> str:
        return ": ".join(self.args)


class UnreadableFile(SampleError):
    """A picture's file that the disk or the system does not give, which says nothing of the picture."""

    def __init__(self, error: OSError):
        super().__init__(
            f"the file could not be read ({error.strerror or error}), which is no fault of the picture",
            "see to the rights of the file and its folder, or to the disk, and start again",
        )


class TooManyPixels(SampleError):
    """A picture beyond a limit that may be raised."""


@dataclass
class Rendered:
    """One conversation as token ids, and for each of them whether it is learnt and whether it is a placeholder.

    Several conversations may stand in one row (dataset.batching). Those that begin alike share a trunk: it stands once,
    and the rest of each is a branch, which sees the trunk and itself. `branch` numbers both within the row; `trunk` is
    the number of the trunk that a token belongs to or grows from.
    """

    input_ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    image_mask: list[bool] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    trunk: list[int] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)  # where and why, see dataset.quarantine

    def extend(self, ids: Sequence[int], trained: bool = False, image: bool = False) -> None:
        self.input_ids += ids
        self.trained += [trained] * len(ids)
        self.image_mask += [image] * len(ids)
        self.branch += [0] * len(ids)
        self.trunk += [0] * len(ids)

    def unlearn(self, where: str, reason: str) -> None:
        """Ignore every label: a picture of this row is damaged."""
        self.trained = [False] * len(self.trained)
        self.damaged.append((where, reason))

    def truncate(self, max_length: int) -> None:
        if any(self.image_mask[max_length:]):
            needed = len(self.image_mask) - self.image_mask[::-1].index(True)
            raise SampleError(
                f"its last picture ends at token {needed} and would be cut: raise --max_seq_len above {max_length}"
            )
        for column in (self.input_ids, self.trained, self.image_mask, self.branch, self.trunk):
            del column[max_length:]

    @property
    def labels(self) -> list[int]:
        return [i if learnt else IGNORE_INDEX for i, learnt in zip(self.input_ids, self.trained, strict=True)]

    @property
    def positions(self) -> np.ndarray:
        """Each token's place in its own conversation: a branch goes on where its trunk ends."""
        branch, trunk, index = np.array(self.branch), np.array(self.trunk), np.arange(len(self.branch))
        numbers, starts, sizes = np.unique(branch, return_index=True, return_counts=True)
        own = np.searchsorted(numbers, branch)
        grows_from = np.searchsorted(numbers, trunk)
        return index - starts[own] + np.where(branch == trunk, 0, sizes[grows_from])


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, by default the shipped one."""
    return PreTrainedTokenizerFast.from_pretrained(folder or Path(__file__).parent)


def open_picture(
    source: str | Path | BinaryIO | Image.Image, decode: bool = True, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture as RGB, turned as its EXIF says, transparency on white.

    decode: False only looks at the header, which is fast, and finds what is no picture but not what is cut short.

    Raises:
        SampleError: it is missing, no picture, too large, or damaged, or the disk or the system does not give it.
    """
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source, formats=PICTURE_FORMATS)
        _check_size(*picture.size, max_pixels)
        if not decode:
            return picture
        if picture.width * picture.height > MAX_PIXELS:
            picture.draft(None, (DRAFT_SIDE, DRAFT_SIDE))
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits to white
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except SampleError:
        raise
    except FileNotFoundError:
        raise SampleError("the file does not exist", "check --images_path") from None
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in NO_FILE:
            raise UnreadableFile(error) from error
        raise SampleError(f"it cannot be read as a picture ({error})", "replace it or delete the line") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    longer, shorter = max(width, height), min(width, height)
    if width * height > max_pixels:
        raise TooManyPixels(f"it has {width} x {height} pixels, more than {max_pixels:,}: scale it down")
    if longer > MAX_SIDE:
        raise SampleError(f"it has {width} x {height} pixels, a side of more than {MAX_SIDE:,}: scale it down")
    if longer > MAX_RATIO * shorter:
        raise SampleError(f"it has {width} x {height} pixels, too long and thin ({MAX_RATIO}:1 at most): cut it")


class VLMProcessor:
    """Renders conversations and pictures for a model that sees `image_size` pixels as `image_tokens` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int = 196, image_size: int = 224):
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.image_token_id = IMAGE_TOKEN_ID
        self.image_size = image_size
        self._encoded: dict[str, tuple[int, ...]] = {}  # questions repeat
        self.new_line = self.encode("\n")
        self.headers = {role: (START_ID, *self.encode(role), *self.new_line) for role in ROLES}

    @classmethod
    def for_config(cls, config: MiniMindConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> "VLMProcessor":
        tokenizer = tokenizer or load_tokenizer()
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the weights know {config.vocab_size}: put the "
                "tokenizer.json that they were trained with in the place of model/tokenizer.json"
            )
        if isinstance(config, VLMConfig):
            return cls(tokenizer, config.image_tokens, config.image_size)
        return cls(tokenizer)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_encoded": {}}  # processes that read pictures encode no text

    def fingerprint(self) -> str:
        """Of all that decides which ids a text becomes."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.chat_template), self.image_tokens)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text to ids; what looks like a control token is spelt out as text, so nobody can type one."""
        if text in self._encoded:
            return self._encoded[text]
        if len(self._encoded) >= REMEMBERED_TEXTS:
            self._encoded.clear()
        try:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except (TypeError, UnicodeError):
            raise SampleError("its text holds half a surrogate pair, which is not Unicode: fix the encoding") from None
        self._encoded[text] = tuple(ids)
        return self._encoded[text]

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, max_length: int | None = None
    ) -> Rendered:
        """Conversation to ids in one pass, with the labels known from where each piece came.

        messages: role and content each. A string holds IMAGE_TAG where a picture goes; a list of
            {"type": "image"} and {"type": "text", "text": ...} parts takes its text literally.
        add_generation_prompt: end with the opening of an assistant's turn.
        max_length: tokens; what is longer loses its end, but never a part of a picture.

        Raises:
            SampleError: a role or content of the wrong kind, or a picture beyond max_length.
        """
        rendered = Rendered()
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise SampleError(f"a message is {reprlib.repr(message)}: it needs a role, one of {', '.join(ROLES)}")
            answer = message["role"] == "assistant"
            rendered.extend(self.headers[message["role"]])
            for kind, text in content_parts(message.get("content")):
                if kind == "image":
                    rendered.extend([IMAGE_TOKEN_ID] * self.image_tokens, image=True)
                else:
                    rendered.extend(self.encode(text), trained=answer)
            rendered.extend([END_ID], trained=answer)
            rendered.extend(self.new_line)
        if add_generation_prompt:
            rendered.extend(self.headers["assistant"])
        if max_length is not None:
            rendered.truncate(max_length)
        return rendered

    def render_text(self, text: str, max_length: int | None = None) -> Rendered:
        """Plain text for the base decoder: every token is learnt, and the end."""
        rendered = Rendered()
        rendered.extend([START_ID])
        rendered.extend([*self.encode(text), END_ID], trained=True)
        if max_length is not None:
            rendered.truncate(max_length)
        return rendered

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """uint8 [3, image_size, image_size]; the whole picture, squeezed to a square: nothing is cut off."""
        square = picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

    def check_pictures(self, rendered: Rendered, pictures: int) -> None:
        """Raises SampleError where the text has places for more or fewer pictures than there are."""
        wanted = sum(rendered.image_mask) // self.image_tokens
        if wanted != pictures:
            there = "is" if pictures == 1 else "are"
            raise SampleError(f"the text holds {wanted} {IMAGE_TAG} but there {there} {counted(pictures, 'pictures')}")

    def prompts(self, conversations: Sequence[tuple[Sequence[dict], Sequence[Image.Image]]]) -> dict[str, torch.Tensor]:
        """(messages, pictures) pairs to the inputs of generate()."""
        rendered = [
            (self.render(messages, add_generation_prompt=True), pictures) for messages, pictures in conversations
        ]
        return self.prompt_inputs(rendered)

    def prompt_inputs(self, prompts: Sequence[tuple[Rendered, Sequence[Image.Image]]]) -> dict[str, torch.Tensor]:
        """Rendered prompts and their pictures to the inputs of generate(), padded on the left."""
        rows = []
        for rendered, pictures in prompts:
            self.check_pictures(rendered, len(pictures))
            rows.append((rendered, [self.pixels(picture) for picture in pictures]))
        batch = collate(rows, pad_left=True)
        del batch["labels"], batch["loss_positions"], batch["pictures_a_row"]
        return batch


def content_parts(content: str | list | None) -> list[tuple[str, str]]:
    """Message content to ("text", text) and ("image", "") parts in order."""
    if isinstance(content, str):
        first, *rest = content.split(IMAGE_TAG)
        parts = [("text", first)] + [part for text in rest for part in (("image", ""), ("text", text))]
    elif isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [(part.get("type"), "" if part.get("type") == "image" else part.get("text")) for part in content]
        if any(kind not in ("text", "image") or not isinstance(text, str) for kind, text in parts):
            raise SampleError(f"content parts must be text or image, not {content!r:.80}")
    else:
        raise SampleError(f"a message's content is {content!r:.60}: it must be text")
    return [part for part in parts if part != ("text", "")]


def collate(rows: Sequence[tuple[Rendered, list[torch.Tensor]]], pad_left: bool = False) -> dict:
    """Rendered conversations and their pixels to one batch.

    Returns input_ids, attention_mask, image_mask, labels [batch, longest row]; loss_positions [batch, n] as
    MiniMindForCausalLM takes them; pictures_a_row, a list; where any row has a picture
    pixel_values [batch, most pictures a row, 3, height, width] in uint8, or patch_features [batch, most pictures a row,
    image_tokens, vision hidden size] where the rows bring those; and where any row has branches, `branches` [batch, 2,
    longest row], the numbers of branch and trunk, and position_ids [batch, longest row].
    """
    length = max(len(rendered.input_ids) for rendered, _ in rows)
    ids = np.full((len(rows), length), END_OF_TEXT_ID, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
    masks = np.zeros((2, len(rows), length), dtype=bool)  # attention, image
    for number, (rendered, _) in enumerate(rows):
        size = len(rendered.input_ids)
        place = slice(length - size, length) if pad_left else slice(0, size)
        ids[number, place], labels[number, place] = rendered.input_ids, rendered.labels
        masks[0, number, place], masks[1, number, place] = True, rendered.image_mask
    batch = {"input_ids": ids, "labels": labels, "attention_mask": masks[0].astype(np.int64), "image_mask": masks[1]}
    if any(rendered.branch[-1] for rendered, _ in rows):  # padding, on the right, belongs to the last one
        columns = [(row.branch, row.trunk, row.positions) for row, _ in rows]
        padded = np.stack([np.pad(c, ((0, 0), (0, length - len(c[0]))), "edge") for c in columns])
        batch["branches"], batch["position_ids"] = padded[:, :2], padded[:, 2]
    batch = {name: torch.from_numpy(values) for name, values in batch.items()}
    batch["loss_positions"] = positions_before(batch["labels"])
    batch["pictures_a_row"] = [len(pictures) for _, pictures in rows]
    most = max(batch["pictures_a_row"])
    if most:
        example = next(pictures[0] for _, pictures in rows if pictures)
        pictured = torch.zeros((len(rows), most, *example.shape), dtype=example.dtype)
        for number, (_, pictures) in enumerate(rows):
            for index, values in enumerate(pictures):
                pictured[number, index] = values
        batch["pixel_values" if example.dim() == 3 else "patch_features"] = pictured
    return batch
