"""MiniMindVLM: the decoder, a frozen vision tower, and a projector that turns patches into tokens of the text."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from model.config import VLMConfig
from model.messages import UserError
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.projectors import build_projector
from model.vision_encoder import build_tower, encode_patches, kind_of, normalize_pixels, pixel_statistics, tower_config


class MiniMindVLM(MiniMindForCausalLM):
    """MiniMindForCausalLM, a frozen vision tower and the projector between them.

    A picture is a span of `config.image_tokens` placeholder tokens, whose embeddings are replaced by the projected
    patches. image_mask says which tokens are placeholders; ids alone do not tell, as a person may type `@` too.
    """

    config_class = VLMConfig
    main_input_name = "input_ids"

    def __init__(self, config: VLMConfig):
        super().__init__(config)
        self.vision_proj = build_projector(config)
        self.vision_encoder = build_tower(tower_config(config.vision_config))
        self.vision_encoder.requires_grad_(False)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, **options) -> None:
        """As transformers does; where this code ships with a model, 5.3 would leave a tied head, in no file, empty."""
        if missing_keys is not None and self.lm_head.weight.is_meta:
            missing_keys.add("lm_head.weight")
        super().tie_weights(missing_keys=missing_keys, **options)

    def train(self, mode: bool = True) -> "MiniMindVLM":
        super().train(mode)
        self.vision_encoder.train(False)  # frozen: no dropout, whatever the rest does
        return self

    def round_tower(self, dtype: torch.dtype) -> None:
        """Cast the tower's matrices once, as autocast would in each step: the same results, half the memory.

        A kind of tower that needs float32 keeps it, whatever the rest of the model is.
        """
        if kind_of(self.config.vision_config).float32:
            if self.vision_encoder.dtype != torch.float32:  # fake tensors, whose memory is counted, cannot be cast
                self.vision_encoder.float()
            return
        for module in self.vision_encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, height, width], uint8 or already normalized -> [pictures, patches, vision hidden size]."""
        if not len(pixels):  # a batch may bring pictures of which no row has a span
            patches = self.config.patches_a_side**2
            return torch.zeros(0, patches, self.config.vision_hidden_size, device=pixels.device)
        if pixels.dtype == torch.uint8:
            pixels = normalize_pixels(pixels, *pixel_statistics(self.config.vision_config))
        return encode_patches(self.vision_encoder, pixels, self.config.before_last_norm)

    def embed(
        self,
        input_ids: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        pictures_a_row: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Token embeddings [batch, seq, hidden], with the pictures in their places.

        Args:
            input_ids: [batch, seq].
            image_mask: [batch, seq], true at placeholders; each row has image_tokens of them a picture.
            pixel_values: [batch, most pictures a row, 3, height, width], rows with fewer filled up with anything.
            patch_features: [batch, most pictures a row, patches, vision hidden size], what encode_pictures gave
                earlier; instead of pixel_values.
            pictures_a_row: how many each row has, as model.processing counts them for a batch; without it they are
                counted in image_mask, for which the host must wait for the GPU.

        Raises:
            ValueError: a row has an incomplete span, or more spans than pictures.
        """
        embeddings = self.model.embed_tokens(input_ids)
        pictures = pixel_values if patch_features is None else patch_features
        if pictures is None:
            if image_mask is not None and pictures_a_row is None and image_mask.any():
                raise ValueError(f"{int(image_mask.sum())} placeholders are marked but there are no pixel_values")
            return self._with_idle_projector(embeddings) if self.training else embeddings
        if image_mask is None:
            raise ValueError("pixel_values need image_mask, which says where they go")
        if pictures_a_row is None:
            pictures_a_row = self._count_pictures(image_mask, pictures.shape[1])
        pictures = without_filling(pictures, pictures_a_row)
        patches = self.encode_pictures(pictures) if patch_features is None else pictures
        tokens = self.vision_proj(patches.to(embeddings.dtype))  # [pictures, image_tokens, hidden]
        placeholders = image_mask[..., None].bool().to(embeddings.device)  # [batch, seq, 1]
        return embeddings.masked_scatter(placeholders, tokens.to(embeddings))  # to: the tower may be on another device

    def _with_idle_projector(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The same embeddings, with a zero gradient for the projector: other ranks wait for one in every step."""
        device = next(self.vision_proj.parameters()).device  # may be another one, where layers stand on several
        patches = self.config.patches_a_side**2
        zeros = embeddings.new_zeros(1, patches, self.config.vision_hidden_size, device=device)
        return embeddings + (0.0 * self.vision_proj(zeros).sum()).to(embeddings.device)

    def _count_pictures(self, image_mask: torch.Tensor, most: int) -> list[int]:
        """The number of each row, from its placeholders: full spans, and no more of them than `most`."""
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
        """Pictures enter at prefill only: afterwards the cache has them, and a given cache those of earlier turns.

        image_mask: of all of the conversation, or its beginning where no placeholder follows; or of the new tokens,
            where input_ids are those alone. pixel_values: all pictures that it marks, those in the cache too.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if image_mask is None:  # forward refuses pictures without it
            return {**inputs, "pixel_values": pixel_values}
        cache, length = inputs.get(CACHE_NAME), inputs["input_ids"].shape[1]
        if cache is not None and length == 1 and not is_first_iteration:
            return inputs  # one token after another: asking a static cache for its length would wait for the GPU
        start = input_ids.shape[1] - length  # the column of the mask where what is read now begins
        if image_mask.shape[1] > input_ids.shape[1]:
            if start:
                raise UserError(
                    f"image_mask has {image_mask.shape[1]} columns and input_ids {input_ids.shape[1]}: both are to be "
                    "of the whole conversation"
                )
            start = int(cache.get_seq_length()) if cache is not None else 0  # only new tokens, or prefill in chunks
        image_mask = nn.functional.pad(image_mask, (0, max(0, start + length - image_mask.shape[1])))
        if start and pixel_values is not None:
            pixel_values = self._unread_pictures(image_mask, pixel_values, start)
        return {**inputs, "image_mask": image_mask[:, start : start + length], "pixel_values": pixel_values}

    def _unread_pictures(self, image_mask: torch.Tensor, pixel_values: torch.Tensor, start: int) -> torch.Tensor | None:
        """Of each row the pictures whose placeholders begin at column `start` or later; None: no row has any."""
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
    return pictures.flatten(0, 1)[kept.long().to(pictures.device, non_blocking=True)]  # long: even where none is kept
