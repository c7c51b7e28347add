"""run_stage: from a config to saved weights. Read this first; every step is one call into a file of its own.

config -> samples -> processor -> batches -> model -> loop -> weights
"""

from model.device import compile_layers
from model.model_minimind import MiniMindForCausalLM
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer
from trainer.build import build_model, check_start, with_sizes
from trainer.checkpoint.resume import start_or_resume
from trainer.checkpoint.saver import Saver
from trainer.config import StageConfig
from trainer.data import StageData
from trainer.distributed import Runtime, start_runtime
from trainer.exams import read_exams
from trainer.guard.ending import plain_ending
from trainer.guard.needs import check_needs, with_base
from trainer.guard.run_folder import RunFolder
from trainer.guard.signals import StopRequest
from trainer.loop import train
from trainer.optim import freeze_all_but, table_of_parts
from trainer.report.metrics import Report
from trainer.report.next_steps import tell_what_is_left


def run_stage(config: StageConfig) -> None:
    """Train one stage, from a config to weights in config.weight_path. What a user can mend ends in one sentence."""
    with StopRequest() as stop, plain_ending(config.name, stop):
        runtime = start_runtime(config.device, config.dtype, config.seed)
        config = with_base(config, runtime.print0)
        check_needs(config)
        config = with_sizes(config)
        with RunFolder(config, runtime) as folder, runtime.watching():
            train_stage(config, runtime, folder, stop)


def train_stage(config: StageConfig, runtime: Runtime, folder: RunFolder, stop: StopRequest) -> None:
    """The way of a run, for a config without open flags."""
    runtime.print0(
        f"{config.name}: {runtime.world_size} x {runtime.device}, {runtime.dtype}, run folder {config.run_dir}"
    )
    tokenizer = read_tokenizer(config.start_path)
    model = build_model(config, tokenizer, runtime.print0)
    freeze_all_but(model, config.trainable)
    runtime.print0(table_of_parts(model, config))

    processor = VLMProcessor.for_config(model.config, tokenizer)
    exams = read_exams(config, model.config, processor, runtime)
    data = StageData.load(config, processor, runtime, exams)
    data.note_left_out(folder)
    check_start(config, model, data, runtime.print0)

    place(config, runtime, model, data)
    run = start_or_resume(config, runtime, model, data)
    stop.training = True  # from here on a signal is obeyed after a step, once that is saved
    try:
        with Report(run) as report, Saver(run, data, report, folder, stop) as saver:
            train(run, data, report, saver)
    finally:
        if left_out := data.note_left_out(folder):
            runtime.print0(left_out)
    if runtime.is_main:
        tell_what_is_left(config, data.example())


def place(config: StageConfig, runtime: Runtime, model: MiniMindForCausalLM, data: StageData) -> None:
    """The model on its device, in the form in which it trains; pictures encoded once where that is asked for."""
    model.to(runtime.device)
    if config.with_vision:
        model.round_tower(runtime.dtype)
    model.model.gradient_checkpointing = bool(config.checkpoint_activations)
    if config.compile:
        compile_layers(model, runtime.device)
    if config.with_vision and config.cache_features != "none":
        data.encode_pictures(config, model, runtime)
