"""A folder of ONNX files as a model that scripts/export/proof.py can ask, by onnxruntime."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoProcessor


class OnnxModel:
    """Called as the proof calls a model of transformers."""

    def __init__(self, folder: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        files = (str(folder / f"onnx/{name}.onnx") for name in names)
        self.eyes, self.embeddings, self.decoder = (onnxruntime.InferenceSession(file, options) for file in files)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor | None = None,
        past: dict[str, np.ndarray] | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        """logits [batch, seq, vocabulary] of what follows the past, and the past from then on."""
        (embedded,) = self.embeddings.run(None, {"input_ids": input_ids.numpy()})
        if pixel_values is not None:
            (tokens,) = self.eyes.run(None, {"pixel_values": pixel_values.numpy()})
            embedded[input_ids.numpy() == self.processor.image_token_id] = tokens.reshape(-1, tokens.shape[-1])
        if past is None:
            given = {each.name: each.shape for each in self.decoder.get_inputs() if each.name.startswith("past")}
            past = {name: np.zeros((len(input_ids), s[1], 0, s[3]), np.float32) for name, s in given.items()}
        mask = attention_mask.numpy()
        positions = (mask.cumsum(1) - 1).clip(0)[:, -input_ids.shape[1] :]
        inputs = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": positions, **past}
        logits, *present = self.decoder.run(None, inputs)
        return SimpleNamespace(logits=torch.from_numpy(logits), past=dict(zip(past, present, strict=True)))

    def generate(self, max_new_tokens: int, do_sample: bool, **inputs: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens after one row; ids [1, seq + new tokens]."""
        ids, output = inputs["input_ids"], self(**inputs)
        for _ in range(max_new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            if token == self.processor.tokenizer.eos_token_id:
                break
            output = self(token, torch.ones_like(ids), past=output.past)
        return ids
