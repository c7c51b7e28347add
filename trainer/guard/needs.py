"""What a stage needs and does not find, told all at once, with a command that works from what ships."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dataset.readers.opening import is_there
from dataset.sources import named_files, parse_sources
from model.files import SHIPPED_BASE, SHIPPED_TOWER, find_folder
from model.messages import UserError
from model.tower_folder import lacks_tower
from model.weights import read_sizes
from trainer.config import ROOT, SIZES, StageConfig, names_weights
from trainer.report.commands import command, shown, stage_command

BASE = "llm"  # the stage whose weights it can stand for
DATA, EXAMS = "--data_path", "--eval_tasks"


def with_base(config: StageConfig, say: Callable = print) -> StageConfig:
    """The config, --from_weight llm replaced by the shipped base where save_dir has none and that one fits."""
    if config.from_weight != BASE or _stage_files(config) or not _base_fits(config):
        return config
    say(f"--from_weight {BASE}: none in {shown(config.save_dir)}, so the base that ships: {shown(ROOT / SHIPPED_BASE)}")
    return replace(config, from_weight=str(ROOT / SHIPPED_BASE))


def check_needs(config: StageConfig) -> None:
    """Raises UserError naming everything that is absent, where it is the tower or more than one thing.

    What is absent alone is told, with its own cure, by whoever opens it.
    """
    absent, cures = [], []
    tower = config.with_vision and lacks_tower(config.vision_model)
    for flag, lacking in _lacking_files(config).items():
        does_not = "does not exist" if len(lacking) == 1 else "do not exist"
        absent.append(f"{' and '.join(map(shown, lacking))} {does_not} ({flag})")
        build = command("scripts/build_emoji_world.py")
        if build not in cures and any(path.parent == ROOT / "dataset/data" for path in lacking):
            cures.append(build)
    base = _lacks_base(config)
    if base:
        absent.append(f"{shown(config.save_dir)} has no {config.from_weight}_<hidden_size>.safetensors (--from_weight)")
    if tower:
        folder = shown(find_folder(config.vision_model))
        absent.append(f"{folder} holds no vision tower, {tower} (--vision_model)")
    if not tower and len(absent) < 2:
        return
    flags = ["--vision_model", SHIPPED_TOWER] if tower else []
    if base and config.from_weight == BASE:
        flags += ["--from_weight", ROOT / SHIPPED_BASE]
    elif base:
        cures.append(stage_command(config.from_weight, *flags, *_save_dir(config)))
    cures.append(_same_command(config, flags))
    real = f"; openai's tower: `{command('scripts/download.py', 'clip', '--to', folder)}`" if tower else ""
    if base:
        real += f"; MiniMind's base: `{command('scripts/download.py', 'llm')}`, then --from_weight FILE"
    raise UserError(f"{'; '.join(absent)}. With what ships: `{' && '.join(cures)}`{real}")


def _lacking_files(config: StageConfig) -> dict[str, list[Path]]:
    """By the flag that names them."""
    named = {DATA: parse_sources(config.data_path), EXAMS: named_files(config.eval_tasks, EXAMS)}
    lacking = {
        flag: [Path(source.path) for source in sources if source.path and not is_there(source.path)]
        for flag, sources in named.items()
    }
    return {flag: paths for flag, paths in lacking.items() if paths}


def _stage_files(config: StageConfig) -> list[Path]:
    return list(Path(config.save_dir).glob(f"{config.from_weight}_[0-9]*.safetensors"))


def _lacks_base(config: StageConfig) -> bool:
    if config.from_weight == "none" or names_weights(config.from_weight):
        return False
    return not _stage_files(config)


def _base_fits(config: StageConfig) -> bool:
    """Its names stand where the shipped tower puts their pictures: with another tower it is no better than any."""
    if config.with_vision and find_folder(config.vision_model).resolve() != (ROOT / SHIPPED_TOWER).resolve():
        return False
    sizes = _base_sizes()
    return all(getattr(config, name) in (0, sizes.get(name)) for name in SIZES)


@functools.cache
def _base_sizes() -> dict:
    return read_sizes(ROOT / SHIPPED_BASE)


def _same_command(config: StageConfig, flags: list) -> str:
    """What was typed, with these flags; what stands last wins."""
    started = Path(sys.argv[0]).resolve()
    if started.parent == ROOT / "trainer":
        return command(str(started.relative_to(ROOT)), *sys.argv[1:], *flags)
    return stage_command(config.name, *flags, *_save_dir(config))


def _save_dir(config: StageConfig) -> list:
    return [] if Path(config.save_dir) == ROOT / "out" else ["--save_dir", config.save_dir]
