"""lmms-eval itself: a model in its hands, tasks over files that lie here, and one evaluation."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from loguru import logger
from tenacity import RetryError

from model.device import choose_device, choose_dtype
from model.messages import UserError
from model.processing import IMAGE_TAG
from scripts.judge.lmms_model import MiniMindVLM
from scripts.judge.task_folder import OWN


def keep_to_errors() -> None:
    """Of what lmms-eval logs, and on stderr: its warnings would stand among the figures."""
    logger.remove()
    logger.add(sys.stderr, level="ERROR")


class Tasks:
    """Some of lmms-eval's tasks and of ours, each from where its questions are."""

    def __init__(self, names: Sequence[str], model_name: str, own: Sequence[Path], cache: Path):
        """own: folders of tasks of ours. cache: where `datasets` unpacks questions that lie here.

        Raises:
            UserError: there is no task of such a name, or not for such a model.
        """
        public = any(name not in OWN for name in names)  # there are a thousand of them, which take seconds to list
        self.manager = TaskManager(
            include_path=[str(folder) for folder in own], include_defaults=public, model_name=model_name
        )
        self.cache = str(cache)
        self.asked = {name: self._as_published(name) for name in names}
        for name in names:
            if model_name == "llava_hf" and "generate" not in self.config(name).get("output_type", "generate"):
                raise UserError(
                    f"--tasks {name}: lmms-eval makes text of the likelihoods that llava_hf gives, and cannot compare "
                    "them: leave --through llava_hf out"
                )

    def _as_published(self, name: str) -> str | dict:
        """The task as its yaml has it, but for a token, and for where `datasets` unpacks what lies here."""
        if name not in self.manager.all_tasks:
            close = difflib.get_close_matches(name, {*self.manager.all_tasks, *OWN}, n=1)
            meant = f": did you mean {close[0]}?" if close else ""
            raise UserError(f"--tasks {name}: neither lmms-eval nor this project has such a task{meant}")
        wishes = dict(self.config(name).get("dataset_kwargs") or {})
        if name in OWN:
            return self._from_here(name, dataset_kwargs=wishes)
        if wishes.pop("token", False):  # demands that somebody is logged in, where public questions need nobody
            return {"task": name, "dataset_kwargs": wishes}
        return name

    def config(self, name: str) -> dict:
        """What the task's yaml says; nothing of a group of tasks."""
        path = self.manager.task_index[name]["yaml_path"]
        return load_yaml_config(path) if path != -1 and self.manager.task_index[name]["type"] == "task" else {}

    def take_copy(self, name: str, path: Path) -> None:
        """The questions of a public task from here: a .parquet as the hub has it, or the folder of several.

        Raises:
            UserError: there is none, or the name is that of several tasks.
        """
        config = self.config(name)
        split = config.get("test_split") or config.get("validation_split")
        if not split:
            raise UserError(f"--data {name}={path}: {name} is a group of tasks: name one of them")
        files = sorted(path.glob(f"{split}*.parquet")) or sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files or files[0].suffix != ".parquet":
            raise UserError(
                f"--data {name}={path}: a copy is a .parquet or a folder of them, as the hub has it (scripts/score.py "
                "reads VLMEvalKit's .tsv)"
            )
        self.asked[name] = self._from_here(
            name,
            dataset_path="parquet",
            dataset_name=None,
            dataset_kwargs={"data_files": {split: [str(file.resolve()) for file in files]}},
            process_docs=config.get("process_docs") or _with_pictures,
        )

    def _from_here(self, name: str, **changes: object) -> dict:
        changes["dataset_kwargs"] = {**changes["dataset_kwargs"], "cache_dir": self.cache}
        return {"task": name, **changes}


def _with_pictures(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.cast_column("image", datasets.Image()) if "image" in rows.column_names else rows


def load_model(options: argparse.Namespace) -> lmms:
    """--model in the hands of our engine, or of lmms-eval's own code. Raises UserError: it cannot be loaded there."""
    path, device = str(options.model), choose_device(options.device)
    dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
    if options.through == "minimind_vlm":
        return MiniMindVLM(path, options.batch_size, str(device), dtype, options.vision_model)
    if not options.model.is_dir():
        raise UserError(f"--model {path}: llava_hf reads folders: python scripts/convert_vlm.py --to llava makes one")
    try:
        model_class = get_model("llava_hf", force_simple=True)  # the one that takes a prompt with <image> as it is
    except ImportError as error:
        raise UserError(
            f"llava_hf needs {error.name}, which lmms-eval does not ask for: it is in requirements/lmms.txt"
        ) from error
    return model_class(path, device=str(device), device_map=str(device), dtype=dtype, batch_size=1)


def evaluate(model: lmms, tasks: Tasks, limit: int | None) -> dict:
    """lmms-eval's results, with every sample. Raises UserError: it gave up, as where no hub can be reached."""
    try:
        return simple_evaluate(
            model, tasks=list(tasks.asked.values()), task_manager=tasks.manager, limit=limit, bootstrap_iters=0
        )
    except RetryError as error:
        cause = str(error.last_attempt.exception()).rstrip(".")
        raise UserError(
            f"lmms-eval gave up: {cause}. Where it is questions that cannot be had from here, name a copy: --data "
            "TASK=FILE"
        ) from error


def facts_of(model: lmms, through: str) -> dict[str, str]:
    if isinstance(model, MiniMindVLM):
        engine = model.answerer
        facts = {"dtype": engine.dtype, "device": engine.device, "batch_size": model.batch_size}
    else:
        facts = {"dtype": model.model.dtype, "device": model.device, "batch_size": 1}
    return {"through": through} | {name: str(value).removeprefix("torch.") for name, value in facts.items()}


def first_prompt(model: lmms, task: str, samples: Sequence[dict]) -> str:
    """What the model read of a task's first question, with <image> for a picture's tokens."""
    if isinstance(model, MiniMindVLM):
        return repr(model.first_prompt(task))
    text = samples[0]["arguments"][0]
    message = {"role": "user", "content": text if IMAGE_TAG in text else f"{IMAGE_TAG}\n{text}"}  # as llava_hf does
    return repr(model.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
