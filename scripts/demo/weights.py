"""Which weights the browser demo offers, in which order, and what it says of them; and which of them commands take
where nobody names any."""

import functools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dataset.sources import short_names
from model.config import BICUBIC
from model.files import ROOT, SHIPPED_MODEL, SHIPPED_TOWER, portable_path
from model.messages import UserError, plain
from model.minimind_files import is_minimind
from model.tower_folder import tower_sizes
from model.views import FRAMES, Sight
from model.weights import PROJECTOR_PREFIX, read_weights
from scripts.demo.text import TEXT, translate

STAGES = ("sft_vlm", "pretrain_vlm")  # in the order in which they are offered; what is none of them comes last
BEST = "_best"
SHOWN_CHARACTERS = 60  # of what a file says of itself
ENDINGS = (".safetensors", ".pth")  # of files; what a server's models are called may have dots anywhere
SHOWN_PARTS = 3  # of a data file's path: quickstart/data/sft.jsonl


@dataclass(frozen=True)
class Weight:
    path: Path
    changed: int  # nanoseconds, so that weights that were trained anew are loaded anew
    stage: str
    image_size: int | None  # pixels per side; None: a decoder without eyes
    data: str = ""  # what it was trained on, steps, validation loss and tower: as the file says, "" where it does not
    steps: str = ""
    val_loss: str = ""
    tower: str = ""
    resample: int = BICUBIC  # Pillow's number of the filter that makes a picture image_size large
    tiles: int = 0  # into which it cuts a picture at most
    frames: int = FRAMES  # of a video that it sees at most; 0: a server's, which takes none
    ships: bool = False  # with the project, for who has trained nothing
    server: str = ""  # the address of one that has these weights under the name `path`; "" for a file

    @property
    def sight(self) -> Sight | None:
        """How it takes in a picture; models that are compared need the same."""
        return None if self.image_size is None else Sight(self.image_size, self.resample, self.tiles, self.frames)


def offered(named: Sequence[Path], root: Path, vision_model: str | None = None) -> list[Weight]:
    """All that can be asked, the first of it where nobody chooses: of the folders that somebody named, then of root's
    out/, finished weights before others, at last what ships. Where nothing is named or finished, that comes first.

    vision_model: as for find_weights.
    """
    path = (root / SHIPPED_MODEL).resolve()
    found = _read_weight(path, path.stat().st_mtime_ns) if path.is_file() else None
    ships = [replace(found, ships=True)] if found else []
    trained = [weight for weight in find_weights([*named, root / "out"], vision_model) if weight.path != path]
    own = find_weights(named, vision_model)
    first = [weight for weight in trained if weight in own]
    first += [weight for weight in trained if weight not in first and is_finished(weight)]
    others = [weight for weight in trained if weight not in first]
    return [*first, *others, *ships] if first else [*ships, *others]


def is_finished(weight: Weight) -> bool:
    """Not halfway to a model that answers about pictures: a decoder without eyes, stage 1, a run that is not done."""
    run = weight.path.with_name(weight.path.stem.removesuffix(BEST))
    try:
        done = json.loads((run / "status.json").read_text(encoding="utf-8"))["state"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        done = True  # no run lies beside it: weights that were brought here
    return done and weight.image_size is not None and weight.stage != "pretrain_vlm"


def weights_or_newest(named: Path | None) -> Path:
    """What --weight names; without it the newest finished weights of out/, or what ships, which a line on stderr says.

    Raises:
        UserError: there are none at all.
    """
    if named is not None:
        return named
    found = offered([], ROOT)
    if not found:
        raise UserError(
            f"--weight is missing, {ROOT / 'out'} holds no weights, and {SHIPPED_MODEL}, which ships with the project, "
            f"is gone or damaged: `git checkout {SHIPPED_MODEL}` brings it back, `make quickstart` trains a model"
        )
    which = "the small model that ships; `make quickstart` trains one" if found[0].ships else "the newest in out/"
    print(f"weights: {portable_path(found[0].path)}, {which}; --weight FILE takes others", file=sys.stderr)
    return found[0].path


def find_weights(folders: Sequence[Path], vision_model: str | None = None) -> list[Weight]:
    """The weights of these folders and of the folders in them: folder after folder, the most finished first.

    vision_model: a tower's folder; with it MiniMind's own .pth and folders, which do not name theirs, are offered too.
    A page chooses from this list and nothing else, so no name that comes from a browser is ever a path.
    """
    by_path: dict[Path, Weight] = {}
    for folder in folders:
        paths = [path.resolve() for form in ("*.safetensors", "*/*.safetensors") for path in folder.glob(form)]
        here = [_read_weight(path, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        if vision_model:
            here += [_read_minimind(path, path.stat().st_mtime_ns, vision_model) for path in _minimind_in(folder)]
        for weight in sorted(filter(None, here), key=_how_finished):
            by_path.setdefault(weight.path, weight)
    return list(by_path.values())


def _minimind_in(folder: Path) -> list[Path]:
    """MiniMind's files of a folder and of those in it, and what its conversion made of some: folders."""
    found = [path.resolve() for form in ("*.pth", "*/*.pth") for path in folder.glob(form)]
    for path in (path for form in ("config.json", "*/config.json") for path in folder.glob(form)):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict) and is_minimind(facts):
            found.append(path.parent.resolve())
    return found


@functools.lru_cache(maxsize=256)
def _read_minimind(path: Path, changed: int, vision_model: str) -> Weight | None:
    """None: tensors, but not of a MiniMind that sees."""
    try:
        _, tensors = read_weights(path, shapes_only=True)
        tower = tower_sizes(vision_model)
    except UserError:
        return None
    if not any(name.startswith(PROJECTOR_PREFIX) for name in tensors):
        return None
    stage = next((stage for stage in STAGES if path.stem.startswith(stage)), "")
    size, resample = tower.get("picture_size") or tower["image_size"], tower.get("resample", BICUBIC)
    return Weight(path, changed, stage, size, tower=Path(vision_model).name, resample=resample)


def _how_finished(weight: Weight) -> tuple:
    stage = STAGES.index(weight.stage) if weight.stage in STAGES else len(STAGES)
    return weight.image_size is None, stage, weight.path.stem.endswith(BEST), -weight.changed


@functools.lru_cache(maxsize=256)
def _read_weight(path: Path, changed: int) -> Weight | None:
    """None: a file of tensors, but not a model of this project."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        config, stage = json.loads(facts.get("config", "null")), json.loads(facts.get("stage_config", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    if not isinstance(config, dict) or "hidden_size" not in config:
        return None
    vision = config.get("vision_config") or {}
    data = stage.get("data_path", "") if isinstance(stage, dict) else ""
    return Weight(
        path,
        changed,
        facts.get("stage", ""),
        vision.get("picture_size") or vision.get("image_size"),
        data=short_names(str(data), SHOWN_PARTS),
        steps=facts.get("step", ""),
        val_loss=facts.get("val_loss", ""),
        resample=vision.get("resample", BICUBIC),
        tiles=config.get("tiles", 0),
        frames=config.get("frames") or FRAMES,
        tower=Path(str(config.get("vision_source") or "")).name,
    )


def runs(weights: Sequence[Weight]) -> dict[Weight, Weight | None]:
    """Each of the weights with the `_best` of the same run, where there is one; a `_best` alone stands for itself."""
    by_path = {weight.path: weight for weight in weights}
    best = {weight: by_path.get(weight.path.with_stem(weight.path.stem + BEST)) for weight in weights}
    return {weight: of_run for weight, of_run in best.items() if weight not in best.values()}


def names(weights: Sequence[Weight], language: str) -> dict[Weight, str]:
    """A name for each, no two alike: what it does and its folder, then as much of its path as tells it from others."""

    def folder(weight: Weight) -> str:
        return weight.path.parent.name if weight.path.parent.name != "out" and not weight.ships else ""

    def kind(weight: Weight) -> str:
        if weight.ships:
            return translate(language, "kind_ships")
        if f"kind_{weight.stage}" not in TEXT:
            return weight.path.stem if weight.path.suffix in ENDINGS else weight.path.name
        known = translate(language, f"kind_{weight.stage}")
        return translate(language, "kind_best", kind=known) if weight.path.stem.endswith(BEST) else known

    forms = (
        lambda weight: [kind(weight), folder(weight)],
        lambda weight: [kind(weight), folder(weight), weight.path.stem],
        lambda weight: [kind(weight), str(weight.path)],
    )
    named: dict[Weight, str] = {}
    for form in forms:
        unnamed = {weight: plain(" · ".join(filter(None, form(weight)))) for weight in weights if weight not in named}
        count = Counter(unnamed.values())
        named |= {weight: name for weight, name in unnamed.items() if count[name] == 1}
    return named


def about(weight: Weight, language: str) -> list[str]:
    """What a file says of its training, in sentences of Markdown: its own words stand in code spans, so as text."""
    if weight.server:
        return [translate(language, "served", model=_code(str(weight.path)), server=_code(weight.server))]
    trained_on = translate(language, "trained_on", data=_code(weight.data))
    facts = [trained_on if weight.data else translate(language, "trained_unknown")]
    if weight.ships:
        facts = [translate(language, "ships")]
    if weight.steps.isdecimal():
        facts.append(translate(language, "trained_steps", steps=int(weight.steps)))
    if weight.val_loss:
        facts.append(translate(language, "trained_loss", loss=_code(weight.val_loss)))
    sentences = [" · ".join([*facts, _code(weight.path.name)])]
    if weight.tower == Path(SHIPPED_TOWER).name:
        sentences.append(translate(language, "knows_drawings"))
    return sentences


def file_name(weight: Weight) -> str:
    """Folder and file, as Markdown that shows them as they are."""
    return _code("/".join(weight.path.parts[-2:]))


def _code(text: str) -> str:
    return f"`{plain(text)[:SHOWN_CHARACTERS].replace('`', '?')}`"
