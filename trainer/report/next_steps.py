"""What to type next, once a stage is done: commands to copy, with the paths of this run."""

from pathlib import Path

from dataset.options import AUTO
from dataset.readers.hub_query import is_hub
from dataset.readers.opening import is_there
from dataset.samples import Sample
from dataset.sources import named_files, parse_sources
from model.video import is_video
from model.weights import read_facts
from trainer.config import ROOT, StageConfig
from trainer.report.commands import command, python, shown, stage_command
from trainer.report.curves import draw_curves

AFTER = {"llm": "pretrain_vlm", "pretrain_vlm": "sft_vlm"}  # by the name of the stage
DATA = {"pretrain_vlm": "pretrain.jsonl", "sft_vlm": "sft.jsonl"}
HELD_OUT, HELD_OUT_SHARDS = "held_out.jsonl", "held_out-*.parquet"


def tell_what_is_left(config: StageConfig, example: Sample | None) -> None:
    """At the end of a run: its weights, curves.png in its folder, and next_steps."""
    print(f"weights: {config.weight_path}")
    chart = config.run_dir / "curves.png"
    try:
        best = int(read_facts(config.best_path)["step"]) if config.best_path.is_file() else None
        if draw_curves(config.run_dir / "metrics.jsonl", chart, config.weight_name, best):
            print(f"curves:  {chart}")
    except OSError as error:  # what was trained is saved
        print(f"{chart} cannot be written: {error.strerror}")
    print(next_steps(config, example))


def next_steps(config: StageConfig, example: Sample | None) -> str:
    """Lines to print: the stage that follows, or how to ask, score and show what was trained.

    example: a sample that shows a picture, to ask about.
    """
    following = AFTER.get(config.name)
    if following is None and not config.with_vision:
        return f"next: {command('eval_vlm.py', '--weight', config.weight_path)}"
    if following is None:
        return "\n".join(f"{name:<7}{line}" for name, line in _answers(config, example).items())
    flags: list = ["--from_weight", config.weight_path, "--data_path", _data(config, DATA[following])]
    if str(flags[-1]) == config.data_path:
        flags += _how_to_read(config)
    if config.with_vision:
        flags += ["--vision_model", config.vision_model]
    if Path(config.save_dir) != ROOT / "out":
        flags += ["--save_dir", config.save_dir]
    return f"next: {stage_command(following, *flags)}"


def _how_to_read(config: StageConfig) -> list[str]:
    """Flags that other commands need for this run's own data, or for what was held out of it."""
    said = {
        "--images_path": config.images_path,
        "--data_format": "" if config.data_format == AUTO else config.data_format,
    }
    return [part for flag, value in said.items() if value for part in (flag, value)]


def _data(config: StageConfig, name: str) -> Path | str:
    """The file of this name beside this stage's data; else the data itself, but for texts, which show no pictures."""
    beside = _beside(config, name)
    return config.data_path if config.with_vision and not beside.is_file() else beside


def _beside(config: StageConfig, name: str) -> Path:
    """The file of this name beside the first of the data; for what the hub holds, in the run's folder."""
    first = parse_sources(config.data_path)[0].path
    return Path(config.save_dir) / name if is_hub(first) else Path(first).with_name(name)


def _held_out(config: StageConfig) -> str:
    """What the run has not seen: what validated it, shards of scripts/prepare_data.py, a file beside, or an exam."""
    if config.val_path:
        return parse_sources(config.val_path)[0].path
    shards = Path(parse_sources(config.data_path)[0].path) / HELD_OUT_SHARDS
    if any(shards.parent.glob(shards.name)):
        return str(shards)
    beside = str(_beside(config, HELD_OUT))
    return beside if is_there(beside) else named_files(config.eval_tasks, "--eval_tasks")[0].path or beside


def _answers(config: StageConfig, example: Sample | None) -> dict[str, str]:
    pictures = [picture for picture in (example.pictures if example else ()) if isinstance(picture, Path)]
    asked = [message["content"] for message in (example.messages if example else ()) if message["role"] == "user"]
    flag = "--video" if pictures and is_video(pictures[0]) else "--image"
    flags: list = [flag, pictures[0] if pictures else "FILE"]
    if asked:
        flags += ["--prompt", asked[0].replace("<image>", "").strip()]
    held_out = _held_out(config)
    lines = {"ask:": command("eval_vlm.py", "--weight", config.weight_path, *flags)}
    if is_there(held_out):
        sheet = config.run_dir / "sheet.png"
        score = ("--weight", config.weight_path, "--data", held_out, *_how_to_read(config), "--sheet", sheet)
        lines["score:"] = command("scripts/score.py", *score)
    else:
        lines["score:"] = (
            f"put lines that it has not seen into {shown(Path(held_out))}, then scripts/score.py; or hold some of the "
            "data out with scripts/prepare_data.py --split"
        )
    folder = Path(config.save_dir).resolve()
    elsewhere = () if ROOT / "out" in (folder, folder.parent) else ("--", folder)  # the demo looks there by itself
    lines["chat:"] = python("-m", "streamlit", "run", ROOT / "web_demo.py", *elsewhere)
    return lines
