"""MiniMindVLM whose tower is not in the folder: it is named when the model is loaded, and checked."""

from pathlib import Path

from model.model_vlm import MiniMindVLM
from model.tower_folder import read_tower


class MiniMindVLMWithoutVision(MiniMindVLM):
    _keys_to_ignore_on_load_missing = [r"^vision_encoder\."]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *arguments, vision_model: str | Path | None = None, **options
    ) -> "MiniMindVLMWithoutVision":
        """As PreTrainedModel's. vision_model: the tower's folder, by default `vision_model` inside this one.

        Raises:
            ValueError: no tower there, or another than the one trained with.
        """
        loaded = super().from_pretrained(folder, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        tower_folder, wanted = Path(vision_model or Path(folder) / "vision_model"), model.config.vision_sha256
        if not tower_folder.is_dir():
            raise ValueError(
                f"{folder} comes without its vision tower ({model.config.vision_source}, sha256 {wanted}) and "
                f"{tower_folder} does not exist: put it there, or name it with vision_model=..."
            )
        tower, sha256 = read_tower(tower_folder)
        if sha256 != wanted:
            raise ValueError(f"{tower_folder} is another tower (sha256 {sha256}) than the one trained with ({wanted})")
        model.vision_encoder = tower.to(model.device, model.dtype)
        return loaded
