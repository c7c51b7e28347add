"""Messages and pictures to model inputs: one renderer for training, evaluation, the demo and the score.

messages   [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", "content": "a cat"}]
text       <|im_start|>user\\n@@@ ... @@@\\nWhat is it?<|im_end|>\\n<|im_start|>assistant\\na cat<|im_end|>\\n
image_mask                     (196 true)
labels                                                                              a cat<|im_end|>
"""

import hashlib
import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from model.chat_format import ChatFormat
from model.config import BICUBIC, END_OF_TEXT_ID, IGNORE_INDEX, IMAGE_TOKEN_ID, MiniMindConfig, VLMConfig
from model.messages import UserError, counted
from model.model_minimind import positions_before
from model.pictures import SampleError
from model.tokenizer_files import load_tokenizer
from model.views import FRAMES, Cut, Frames, Sight

IMAGE_TAG = "<image>"
ROLES = ("system", "user", "assistant")
CACHED_TEXTS, CACHED_LENGTH = 65536, 256  # characters; what strangers send to a server is not to fill its memory


class Piece(NamedTuple):
    """Tokens of a row that are of one kind."""

    ids: Sequence[int]
    trained: bool = False  # whether the model learns to predict them
    image: bool = False  # whether they are the placeholders of a picture


@dataclass(eq=False)
class Rendered:
    """A row of tokens, a conversation or several, in columns: arrays [tokens] that are cut and joined together.

    Conversations that begin alike share that beginning (dataset.batching): it stands once, as a shared prefix, and the
    rest of each is a branch, which sees the prefix and itself. Both are numbered within the row, in one count.
    """

    input_ids: np.ndarray  # int64
    trained: np.ndarray  # bool, whether the model learns to predict the token
    image_mask: np.ndarray  # bool, whether it is a placeholder of a picture
    branch: np.ndarray  # int64, the number of the branch, or of the shared prefix, that the token belongs to
    shared_prefix: np.ndarray  # int64, the number of the prefix that the token belongs to or continues

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Rendered":
        """One conversation, which is a prefix without branches."""
        ids, trained, image = zip(*pieces, strict=True) if pieces else ((), (), ())
        sizes = np.array([len(piece) for piece in ids], int)
        input_ids = np.fromiter(chain.from_iterable(ids), np.int64, sizes.sum())
        trained, image_mask = np.array((trained, image), bool).repeat(sizes, axis=1)  # [2, pieces] -> [2, tokens]
        zeros = np.zeros_like(input_ids)
        return cls(input_ids, trained, image_mask, zeros, zeros)

    @classmethod
    def concatenate(cls, rows: Sequence["Rendered"]) -> "Rendered":
        return cls(*map(np.concatenate, zip(*(vars(row).values() for row in rows), strict=True)))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, kept: slice | np.ndarray) -> "Rendered":
        """kept: a slice, or a mask [tokens]."""
        return Rendered(*[column[kept] for column in vars(self).values()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rendered) and all(map(np.array_equal, vars(self).values(), vars(other).values()))

    def truncated(self, max_length: int) -> "Rendered":
        """The first max_length tokens. Raises SampleError where a part of a picture would be cut off."""
        if self.image_mask[max_length:].any():
            needed = np.flatnonzero(self.image_mask)[-1] + 1
            raise SampleError(
                f"its last picture ends at token {needed} and would be cut: raise --max_seq_len above {max_length}"
            )
        return self[:max_length]

    @property
    def labels(self) -> np.ndarray:
        return np.where(self.trained, self.input_ids, IGNORE_INDEX)

    @property
    def positions(self) -> np.ndarray:
        """Each token's place in its own conversation: a branch continues where its shared prefix ends."""
        numbers, starts, sizes = np.unique(self.branch, return_index=True, return_counts=True)
        own = np.searchsorted(numbers, self.branch)
        prefix = np.searchsorted(numbers, self.shared_prefix)
        before = np.where(self.branch == self.shared_prefix, 0, sizes[prefix])
        return np.arange(len(self)) - starts[own] + before


class VLMProcessor:
    """Renders conversations and pictures for a model that sees `image_size` pixels as `image_tokens` tokens.

    What stands around the words is the tokenizer's chat template's, see model.chat_format.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, image_tokens: int = 196, image_size: int = 224,
        image_token_id: int = IMAGE_TOKEN_ID, resample: int = BICUBIC, tiles: int = 0,
        frames: int = 0,
    ):  # fmt: skip
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.image_span = Piece([image_token_id] * image_tokens, image=True)
        self.image_token_id = image_token_id
        self.image_size, self.resample = image_size, resample
        self.sight = Sight(image_size, resample, tiles, frames or FRAMES)
        self._encoded: dict[str, tuple[int, ...]] = {}  # questions repeat
        line, letter, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", "a", "\na"))
        self._line_break = len(line)  # tokens of one, where a text begins with it
        self._marks_beginnings = both != line + letter  # sentencepiece puts a mark there, and these are not beginnings
        chat = ChatFormat.of(tokenizer)
        self.beginning = Piece(self.control(chat.begin, first=True))
        self.first_openings = {role: Piece(self.control(text, first=True)) for role, text in chat.open}
        self.openings = {role: Piece(self.control(text)) for role, text in chat.open}  # of all that follow
        self.endings = {role: Piece(self.control(text)) for role, text in chat.close}  # not learnt
        self.end = Piece(self.control(chat.end), trained=True)  # of an answer
        self.end_id = self.end.ids[-1]
        self.start_id = tokenizer.bos_token_id  # of plain text; None: nothing
        self.padding_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else END_OF_TEXT_ID

    @classmethod
    def for_config(cls, config: MiniMindConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> "VLMProcessor":
        tokenizer = tokenizer or load_tokenizer()
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the weights know {config.vocab_size}: put the "
                "tokenizer.json that they were trained with beside them"
            )
        if isinstance(config, VLMConfig):
            looks = (config.image_size, config.image_token_id, config.resample, config.tiles, config.frames)
            return cls(tokenizer, config.image_tokens, *looks)
        return cls(tokenizer)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_encoded": {}}  # processes that read pictures encode no text

    def fingerprint(self) -> str:
        """Of all that decides which ids a text becomes."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.chat_template), self.image_tokens)
        parts += (self.sight.tiles, self.image_size) if self.sight.tiles else ()
        parts += ("frames", self.sight.frames) if self.sight.frames != FRAMES else ()
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text to ids; what looks like a control token is spelt out as text, so nobody can type one."""
        if text in self._encoded:
            return self._encoded[text]
        try:
            ids = self._ids(text, split_special_tokens=True)
        except (TypeError, UnicodeError):
            raise SampleError("its text holds half a surrogate pair, which is not Unicode: fix the encoding") from None
        if len(text) <= CACHED_LENGTH:
            if len(self._encoded) >= CACHED_TEXTS:
                self._encoded.clear()
            self._encoded[text] = ids
        return ids

    def control(self, text: str, first: bool = False) -> tuple[int, ...]:
        """A text of the chat template to ids, control tokens as such. first: nothing stands before it."""
        return self._ids(text, first)

    def _ids(self, text: str, first: bool = False, split_special_tokens: bool = False) -> tuple[int, ...]:
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        if first or not self._marks_beginnings:
            return tuple(self.tokenizer(text, **options)["input_ids"])
        return tuple(self.tokenizer(f"\n{text}", **options)["input_ids"][self._line_break :])

    def render(
        self, messages: Sequence[dict], add_generation_prompt: bool = False,
        headings: Sequence[Sequence[str]] | None = None,
    ) -> Rendered:  # fmt: skip
        """Conversation to ids in one pass, with the labels known from where each piece came.

        messages: role and content each. A string holds IMAGE_TAG where a picture goes; a list of
            {"type": "image"} and {"type": "text", "text": ...} parts takes its text literally.
        add_generation_prompt: end with the opening of an assistant's turn.
        headings: of the views of each picture in order (model.views); without them each picture is one view.

        Raises:
            SampleError: a role or content of the wrong kind, or places for more or fewer pictures than have headings.
        """
        pieces, pictures = [], 0
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise SampleError(f"a message is {reprlib.repr(message)}: it needs a role, one of {', '.join(ROLES)}")
            role, answer = message["role"], message["role"] == "assistant"
            if role not in self.openings:
                raise SampleError(
                    f"a message's role is {role!r}, which this base's chat template does not write",
                    "put its words into the first question",
                )
            if not pieces and role != "system" and self.beginning.ids:
                pieces.append(self.beginning)
            pieces.append((self.openings if pieces else self.first_openings)[role])
            for kind, text in content_parts(message.get("content")):
                if kind == "image":
                    pieces += self.spans(headings[pictures] if headings and pictures < len(headings) else ("",))
                    pictures += 1
                else:
                    pieces.append(Piece(self.encode(text), trained=answer))
            pieces += (self.end, self.endings[role]) if answer else (self.endings[role],)
        if add_generation_prompt:
            pieces.append(self.openings["assistant"])
        if headings is not None and pictures != len(headings):
            raise _wrong_number(pictures, len(headings))
        return Rendered.of(pieces)

    def spans(self, headings: Sequence[str]) -> list[Piece]:
        """A picture's views: a span each, behind its heading where it has one."""
        pieces = []
        for heading in headings:
            pieces += (Piece(self.encode(heading)), self.image_span) if heading else (self.image_span,)
        return pieces

    def render_text(self, text: str) -> Rendered:
        """Plain text for the base decoder: every token is learnt, and the end."""
        start = () if self.start_id is None else (self.start_id,)
        return Rendered.of([Piece(start), Piece([*self.encode(text), self.end_id], trained=True)])

    def square(self, picture: Image.Image) -> Image.Image:
        """The whole picture, squeezed: nothing is cut off."""
        return self.sight.square(picture)

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """uint8 [3, image_size, image_size]"""
        return as_tensor(self.square(picture))

    def views(self, picture: Image.Image | Frames, cut: Cut | None = None) -> list[torch.Tensor]:
        """uint8 [3, image_size, image_size] of each view. cut: by default the one that fits."""
        return [as_tensor(view) for view in self.sight.views(picture, cut or self.sight.cut(picture))]

    def check_pictures(self, rendered: Rendered, views: int) -> None:
        """Raises SampleError where the text has places for more or fewer views of pictures than there are."""
        wanted = int(rendered.image_mask.sum()) // self.image_tokens
        if wanted != views:
            raise _wrong_number(wanted, views)

    def prompts(self, conversations: Sequence[tuple[Sequence[dict], Sequence[Image.Image]]]) -> dict[str, torch.Tensor]:
        """(messages, pictures) pairs to the inputs of generate()."""
        prompts = (
            (self.render(messages, True, [self.sight.cut(picture).headings for picture in pictures]), pictures)
            for messages, pictures in conversations
        )
        return self.prompt_inputs(prompts)

    def prompt_inputs(self, prompts: Iterable[tuple[Rendered, Sequence[Image.Image]]]) -> dict[str, torch.Tensor]:
        """Rendered prompts and their pictures to the inputs of generate()."""
        rows = []
        for rendered, pictures in prompts:
            views = [view for picture in pictures for view in self.views(picture)]
            self.check_pictures(rendered, len(views))
            rows.append((rendered, views))
        return collate_prompts(rows, self.padding_id)


def as_tensor(view: Image.Image) -> torch.Tensor:
    """RGB to uint8 [3, height, width]."""
    return torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()


def _wrong_number(places: int, pictures: int) -> SampleError:
    there = "is" if pictures == 1 else "are"
    return SampleError(f"the text holds {places} {IMAGE_TAG} but there {there} {counted(pictures, 'pictures')}")


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


def collate_training(rows: Sequence[tuple[Rendered, Sequence[torch.Tensor]]], padding_id: int = END_OF_TEXT_ID) -> dict:
    """Rows and their pictures to one batch to learn from, padded on the right, where causal attention never looks.

    Returns input_ids, image_mask, labels [batch, longest row]; loss_positions [batch, n] as MiniMindForCausalLM takes
    them; pictures_a_row, a list; what `_pictures` returns; and where any row has branches, `branches` [batch, 2,
    longest row], the numbers of branch and shared prefix, and position_ids [batch, longest row].
    """
    rendered = [row[0] for row in rows]
    batch = {
        "input_ids": _padded([row.input_ids for row in rendered], padding_id),
        "image_mask": _padded([row.image_mask for row in rendered], False),
        "labels": _padded([row.labels for row in rendered], IGNORE_INDEX),
        "pictures_a_row": [len(row[1]) for row in rows],
        **_pictures(rows),
    }
    batch["loss_positions"] = positions_before(batch["labels"])
    if any(row.branch[-1] for row in rendered):
        columns = [np.stack([row.branch, row.shared_prefix, row.positions]) for row in rendered]
        longest = max(map(len, rendered))
        # padding belongs to the row's last branch
        padded = [np.pad(column, ((0, 0), (0, longest - column.shape[1])), "edge") for column in columns]
        numbers = torch.from_numpy(np.stack(padded))  # [batch, 3, longest row]
        batch["branches"], batch["position_ids"] = numbers[:, :2], numbers[:, 2]
    return batch


def collate_prompts(
    rows: Sequence[tuple[Rendered, Sequence[torch.Tensor]]], padding_id: int = END_OF_TEXT_ID
) -> dict[str, torch.Tensor]:
    """Rows and their pictures to the inputs of generate(), padded on the left.

    Returns input_ids, attention_mask, image_mask [batch, longest row] and what `_pictures` returns.
    """
    rendered = [row[0] for row in rows]
    return {
        "input_ids": _padded([row.input_ids for row in rendered], padding_id, side="left"),
        "attention_mask": _padded([np.ones_like(row.input_ids) for row in rendered], 0, side="left"),
        "image_mask": _padded([row.image_mask for row in rendered], False, side="left"),
        **_pictures(rows),
    }


def _padded(columns: Sequence[np.ndarray], filling: int, side: str = "right") -> torch.Tensor:
    """[batch, longest row]"""
    return pad_sequence([torch.from_numpy(column) for column in columns], True, filling, side)


def _pictures(rows: Sequence[tuple[Rendered, Sequence[torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Where any row has a picture, those of all rows, filled up with zeros.

    pixel_values uint8 [batch, most pictures a row, 3, height, width], or patch_features [batch, most pictures a row,
    patches, vision hidden size] where the rows bring those.
    """
    example = next((row[1][0] for row in rows if row[1]), None)
    if example is None:
        return {}
    none = example.new_zeros(0, *example.shape)
    pictures = pad_sequence([torch.stack(row[1]) if row[1] else none for row in rows], batch_first=True)
    return {"pixel_values" if example.dim() == 3 else "patch_features": pictures}
