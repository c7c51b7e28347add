"""The code that ships in a `transformers` folder: this project's own files, where only the import lines differ."""

import re
from pathlib import Path

from model.files import ROOT

TEMPLATES = Path(__file__).resolve().parent / "templates"
OWN_IMPORT = re.compile(r"^from model\.(\w+) import", re.MULTILINE)
RENAMED = {  # modules of model/ that ship under the names by which such files go elsewhere
    "config": "configuration_minimind_vlm",
    "model_minimind": "modeling_minimind",
    "model_vlm": "modeling_minimind_vlm",
    "processing": "rendering",
}


def _needs(text: str) -> set[str]:
    """Modules of model/ that code imports, and that those import."""
    imported = set(OWN_IMPORT.findall(text))
    return imported.union(*(_needs((ROOT / f"model/{name}.py").read_text(encoding="utf-8")) for name in imported))


def _shipped_files() -> dict[str, Path]:
    """What may ship, by its name there: the templates, and what they import, directly or not."""
    templates = {path.name: path for path in sorted(TEMPLATES.glob("*.py"))}
    modules = set().union(*(_needs(path.read_text(encoding="utf-8")) for path in templates.values()))
    return {f"{RENAMED.get(name, name)}.py": ROOT / f"model/{name}.py" for name in sorted(modules)} | templates


SHIPPED_CODE = _shipped_files()


def shipped_code(name: str) -> str:
    """A file of SHIPPED_CODE as it ships: the project's own, importing its neighbours in the folder."""
    neighbours = {path.stem: shipped.removesuffix(".py") for shipped, path in SHIPPED_CODE.items()}
    text = SHIPPED_CODE[name].read_text(encoding="utf-8")
    shipped = OWN_IMPORT.sub(lambda match: f"from .{neighbours[match[1]]} import", text)
    further = sorted(neighbours[module] for module in _needs(text) - set(OWN_IMPORT.findall(text)))
    if further:  # what its neighbours import
        shipped += "\n\n# transformers 5.3 copies no file but those that are named here\n"
        shipped += "".join(f"from .{module} import __name__ as _  # noqa: E402, F401\n" for module in further)
    return shipped


def files_behind(*names: str) -> list[str]:
    """These files of SHIPPED_CODE, and all that they import."""
    needed = set().union(*(_needs(SHIPPED_CODE[name].read_text(encoding="utf-8")) for name in names))
    return [shipped for shipped, path in SHIPPED_CODE.items() if shipped in names or path.stem in needed]
