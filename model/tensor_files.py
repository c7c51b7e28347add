"""One file of tensors: a safetensors, or what torch saves, of which nothing is ever run."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from model.messages import UserError, plain


def read_tensor_file(path: Path, shapes_only: bool = False) -> tuple[dict | None, dict[str, torch.Tensor]]:
    """The config in a safetensors' metadata (None: it has none) and the tensors, as the file names them.

    shapes_only: read no more than the header; the tensors of a .safetensors then have a shape and no content.

    Raises:
        UserError: the file is cut off, or holds something else than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {}).get("config", "null"))
                names = file.keys()
                if shapes_only:
                    tensors = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
                else:
                    tensors = {name: file.get_tensor(name) for name in names}
        else:
            mmap = shapes_only and zipfile.is_zipfile(path)  # what torch writes today; older files are read
            config, tensors = None, torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no weights file ({str(error)[:200]}): copy or train it again") from error
    except Exception as error:  # torch raises pickle.UnpicklingError, which this project never imports
        # Its advice is to run whatever the file holds; what it met stands behind that.
        reason = str(error).partition("WeightsUnpickler error: ")[2].partition("\n")[0].partition(" was not")[0]
        if not reason.startswith("Unsupported global"):
            raise UserError(f"{path} is no weights file of torch: copy or download it again") from error
        raise UserError(
            f"{path} holds more than tensors ({plain(reason[:120])}), which could run as code, and is refused: "
            "save its state_dict alone"
        ) from error
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return config, dict(tensors)
