"""The decoder that sees: MiniMindVLM puts projected patch embeddings where the text holds placeholder spans."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig

from model.config import VLMConfig
from model.messages import UserError
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.vision_encoder import build_tower, normalize_pixels


class VisionProj(nn.Module):
    """Patch embeddings to token embeddings: one linear layer."""

    def __init__(self, vision_size: int, hidden_size: int):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_size, hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.vision_proj(patches)


class MiniMindVLM(MiniMindForCausalLM):
    """MiniMindForCausalLM, a frozen CLIP tower and the projector between them.

    A picture is a span of `config.image_tokens` placeholder tokens. Which tokens are placeholders is told by
    image_mask, never guessed from the ids: a person may type `@` too.
    """

    config_class = VLMConfig
    main_input_name = "input_ids"

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.vision_proj = VisionProj(config.vision_hidden_size, config.hidden_size)
        self.vision_encoder = build_tower(CLIPVisionConfig(**config.vision_config))
        self.vision_encoder.requires_grad_(False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, **options) -> None:
        """Loaded as code of its own, a tied head is in no file; transformers 5.3 forgets that and leaves it empty."""
        if missing_keys is not None and self.lm_head.weight.is_meta:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys=missing_keys, **options)

    def train(self, mode: bool = True) -> "MiniMindVLM":
        super().train(mode)
        self.vision_encoder.train(False)  # frozen means asleep: no dropout, whatever the rest does
        return self

    def round_tower(self, dtype: torch.dtype) -> None:
        """Keep the tower's matrices as autocast to dtype rounds them in each step: same results, half the memory."""
        for module in self.vision_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, height, width], uint8 or already normalized -> [pictures, image_tokens, vision hidden size]."""
        if not len(pixels):  # a batch may carry pictures that no row of it shows
            return torch.zeros(0, self.config.image_tokens, self.config.vision_hidden_size, device=pixels.device)
        if pixels.dtype == torch.uint8:
            pixels = normalize_pixels(pixels)
        return self.vision_encoder(pixels.to(self.vision_encoder.dtype)).last_hidden_state[:, 1:]

    def embed(
        self,
        input_ids: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        pictures_a_row: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Token embeddings with the pictures in their places.

        Args:
            input_ids: [batch, seq].
            image_mask: [batch, seq], true at placeholders; each row has image_tokens of them a picture.
            pixel_values: [batch, most pictures a row, 3, height, width], rows with fewer filled up with anything.
            patch_features: [batch, most pictures a row, image_tokens, vision hidden size] instead, what encode_pictures
                once gave.
            pictures_a_row: how many each row has, from whoever made the batch (model.processing.collate); without it
                they are counted in image_mask, for which a GPU must be waited for.

        Raises:
            ValueError: a row has other than a whole number of spans, or more of them than pictures.
        """
        embeddings = self.model.embed_tokens(input_ids)
        pictures = pixel_values if patch_features is None else patch_features
        if pictures is None:
            if image_mask is not None and pictures_a_row is None and image_mask.any():
                raise ValueError(f"{int(image_mask.sum())} placeholders are marked but there are no pixel_values")
            if self.training:  # the projector takes part in every step, or ranks without pictures would hang the others
                device = next(self.vision_proj.parameters()).device  # where layers stand on several, another one
                nothing = embeddings.new_zeros(1, self.config.vision_hidden_size, device=device)
                embeddings = embeddings + (0.0 * self.vision_proj(nothing).sum()).to(embeddings.device)
            return embeddings
        if image_mask is None:
            raise ValueError("pixel_values need image_mask, which says where they go")
        if pictures_a_row is None:
            pictures_a_row = self._count_pictures(image_mask, pictures.shape[1])
        pictures = without_filling(pictures, pictures_a_row)
        if patch_features is None:
            pictures = self.encode_pictures(pictures)
        tokens = self.vision_proj(pictures.to(embeddings.dtype))  # [pictures, image_tokens, hidden]
        places = image_mask[..., None].bool().to(embeddings.device)  # the tower may stand on another one
        return embeddings.masked_scatter(places, tokens.to(embeddings))

    def _count_pictures(self, image_mask: torch.Tensor, most: int) -> list[int]:
        """Of each row, from its placeholders, which must be those of whole pictures and of no more than `most`."""
        tokens, counts = self.config.image_tokens, image_mask.sum(1).tolist()
        for row, placeholders in enumerate(counts):
            if placeholders % tokens or placeholders > most * tokens:
                raise ValueError(
                    f"row {row} has {placeholders} placeholders and at most {most} pictures, and a picture takes "
                    f"{tokens} placeholders"
                )
        return [placeholders // tokens for placeholders in counts]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        """Pictures enter at prefill only: afterwards the cache remembers them, and a given one those of earlier turns.

        image_mask: of the whole conversation, or its beginning where no placeholder follows; or of the new tokens,
            where input_ids are those alone. pixel_values: all pictures that it marks, those in the cache too.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if image_mask is None:  # without which pictures are refused
            return {**inputs, "pixel_values": pixel_values}
        cache, length = inputs.get(CACHE_NAME), inputs["input_ids"].shape[1]
        if cache is not None and length == 1 and not is_first_iteration:
            return inputs  # word after word; how much it knows, a static cache would have to ask a GPU
        start = input_ids.shape[1] - length  # of what is read now, in the mask
        if image_mask.shape[1] > input_ids.shape[1]:
            if start:
                raise UserError(
                    f"image_mask has {image_mask.shape[1]} columns and input_ids {input_ids.shape[1]}: both are to be "
                    "of the whole conversation"
                )
            start = int(cache.get_seq_length()) if cache is not None else 0  # new tokens alone, or prefill in chunks
        image_mask = nn.functional.pad(image_mask, (0, max(0, start + length - image_mask.shape[1])))
        if start and pixel_values is not None:
            pixel_values = self._unread_pictures(image_mask, pixel_values, start)
        return {**inputs, "image_mask": image_mask[:, start : start + length], "pixel_values": pixel_values}

    def _unread_pictures(self, image_mask: torch.Tensor, pixel_values: torch.Tensor, start: int) -> torch.Tensor | None:
        """Of each row the pictures whose placeholders stand from column `start` on, first; None: no row has any."""
        counts = self._count_pictures(image_mask, pixel_values.shape[1])
        read = self._count_pictures(image_mask[:, :start], pixel_values.shape[1])
        if counts == read:
            return None
        rows = zip(pixel_values, read, counts, strict=True)
        return pad_sequence([pictures[done:count] for pictures, done, count in rows], batch_first=True)


def without_filling(pictures: torch.Tensor, pictures_a_row: Sequence[int]) -> torch.Tensor:
    """[batch, most pictures a row, ...] -> [pictures, ...]: of each row only so many as it has."""
    most = pictures.shape[1]
    kept = torch.tensor([row * most + n for row, count in enumerate(pictures_a_row) for n in range(count)])
    return pictures.flatten(0, 1)[kept.long().to(pictures.device, non_blocking=True)]
