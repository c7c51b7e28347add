"""run_stage: from a config to saved weights. Read this first; every step is one call into a file of its own.

config -> samples -> processor -> batches -> model -> loop -> weights
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import clear_frames

import torch
from torch.utils.data import Dataset, Subset

from dataset.batching import PackedRows
from dataset.feature_cache import cache_features
from dataset.formats import Sample, read_samples
from dataset.quarantine import QUARANTINE, Quarantine
from dataset.vlm_dataset import ConversationDataset, text_only
from model.config import MiniMindConfig
from model.device import compile_layers
from model.messages import UserError, counted
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor
from model.weights import PROJECTOR_PREFIX, build_vlm, decoder_arguments, init_embeddings, load_weights, read_sizes
from trainer.checkpoint.fingerprint import check_same_on_all_ranks, fingerprints
from trainer.checkpoint.probe import check_probe, probe_facts
from trainer.checkpoint.resume import begin, kept_dropout, kept_settings, resumes
from trainer.checkpoint.saver import Saver
from trainer.config import OPEN, SIZES, StageConfig
from trainer.distributed import RanksLost, Runtime, distribute, start_runtime, stop_runtime
from trainer.guard.needs import check_needs, with_base
from trainer.guard.numbers import NumberWatch
from trainer.guard.refusal import note_for_torchrun, wait_to_be_ended
from trainer.guard.run_folder import RunFolder
from trainer.guard.signals import Stopped, StopRequest
from trainer.guard.workers import WorkersLost, steady_batches
from trainer.loop import batches_of, train, validation_loss
from trainer.optim import build_optimizer, freeze_all_but, table_of_parts
from trainer.order import Order
from trainer.report.loss_curve import draw_losses
from trainer.report.metrics import Metrics
from trainer.report.next_steps import next_steps

CHECKED_SAMPLES = 32  # for the text loss before training


def run_stage(config: StageConfig) -> None:
    """Train one stage, from a config to weights in config.weight_path. What a user can mend ends in one sentence."""
    try:
        _run_or_stop(config)
    except (UserError, RanksLost, WorkersLost) as error:
        sentence = f"{config.name}: {error}"
        if isinstance(error, UserError):
            wait_to_be_ended()
            note_for_torchrun(sentence)
        raise SystemExit(sentence) from error


def _run_or_stop(config: StageConfig) -> None:
    with StopRequest() as stop:
        try:
            runtime = start_runtime(config.device, config.dtype, config.seed)
            config = with_base(config, print if runtime.is_main else lambda *_: None)
            check_needs(config)
            config = with_sizes(config)
            with RunFolder(config, runtime) as folder, runtime.watching():
                _run(config, runtime, folder, stop)
        except (UserError, RanksLost, WorkersLost) as error:
            clear_frames(error.__traceback__)  # they hold what stop_runtime must find released
            raise
        except Stopped as stopped:
            clear_frames(stopped.__traceback__)
            then = "--from_resume 1 goes on from the last checkpoint"  # which all ranks have just written
            if not stop.training:
                then = "before its first step, with nothing to save: the same command begins again"
            print(f"{config.name}: {stopped}; {then}", flush=True)
            raise SystemExit(128 + stopped.number) from stopped
        finally:
            stop_runtime()


def _run(config: StageConfig, runtime: Runtime, folder: RunFolder, stop: StopRequest) -> None:
    say = print if runtime.is_main else (lambda *_: None)
    say(f"{config.name}: {runtime.world_size} x {runtime.device}, {runtime.dtype}, run folder {config.run_dir}")
    model = build_model(config, say)
    freeze_all_but(model, config.trainable)
    say(table_of_parts(model, config))

    processor = VLMProcessor.for_config(model.config)
    quarantine = Quarantine(
        config.run_dir / QUARANTINE, bool(config.strict_data), config.max_bad_share, runtime.is_main
    )
    quarantine.begin(resumes(config))
    data, validation = load_data(config, processor, say, quarantine)
    left_out(quarantine, folder)
    if config.start_path:
        if kept_settings(config) is None:  # a run that is gone on with takes its numbers from a checkpoint
            check_probe(model, processor, config.start_path)
        tell_text_loss(model, data, say)
    rows, lengths = rows_of(config, data, say)
    quarantine.samples_a_row = len(data) / len(rows)
    order = Order(lengths, config.batch_size, config.accumulation_steps, runtime.world_size, config.epochs, config.seed)
    steps, step = counted(order.total_steps, "steps"), counted(order.global_batch, "rows")
    say(f"{steps} of {step} in passes of {config.token_budget:,} tokens at most")
    for line in worth_of_a_step(data, len(rows), order.global_batch):
        say(line)

    model.to(runtime.device)
    if config.with_vision:
        model.round_tower(runtime.dtype)
    if config.compile:
        compile_layers(model, runtime.device)
    if config.with_vision and config.cache_features != "none":
        encode_once(config, model, data, validation, runtime, say)
    found = fingerprints(config, model, processor, data)
    runtime.wait_for_all()
    check_same_on_all_ranks(found, config, model, runtime)
    wrapped = distribute(model, bool(config.shard), runtime, say)
    optimizer = build_optimizer(model, config, runtime.dtype)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    torch.manual_seed(config.seed + runtime.rank)  # dropout differs from rank to rank
    state, order = begin(config, model, optimizer, scaler, order, found, runtime, say)

    metrics = Metrics(config, model, runtime, state.step, order.total_steps, state.tracker_id)
    state.tracker_id = metrics.tracker_id
    validate = validation and partial(validation_loss, model, validation, config.token_budget, runtime, quarantine.take)
    probe = partial(probe_facts, model, processor)
    saver = Saver(config, model, optimizer, scaler, order, found, validate, probe, metrics, folder, stop, runtime)
    numbers = NumberWatch(config, order, partial(where_is, rows), state, scaler, metrics, runtime)
    stop.training = True
    batches = steady_batches(partial(batches_of, rows, order, config, runtime), state.step)
    batches = map(quarantine.take, batches)
    try:
        train(wrapped, optimizer, scaler, batches, order, config, runtime, metrics, state, numbers, saver)
        saver.finish(state)
    except Stopped:
        left_out(quarantine, folder, say)
        raise
    finally:
        saver.wait()
        metrics.close()
    left_out(quarantine, folder, say)
    say(f"weights: {config.weight_path}")
    if runtime.is_main:
        show_losses(config, say)
        say(next_steps(config, an_example(data)))


def left_out(quarantine: Quarantine, folder: RunFolder, say: Callable = lambda *_: None) -> None:
    """Say what was left out, and put the counts into status.json."""
    if quarantine.is_main:
        folder.update(**{f"samples_{kind}": count for kind, count in quarantine.counts().items()})
        if summary := quarantine.summary():
            say(summary)


def show_losses(config: StageConfig, say: Callable = print) -> None:
    """loss.png in the run's folder."""
    path = config.run_dir / "loss.png"
    try:
        if draw_losses(config.run_dir / "metrics.jsonl", path, f"{config.weight_name}: loss a trained token"):
            say(f"loss:    {path}")
    except OSError as error:  # what was trained is saved
        say(f"{path} cannot be written: {error.strerror}")


def an_example(data: Subset) -> Sample | None:
    """The first training sample that shows a picture."""
    for index in data.indices[:CHECKED_SAMPLES]:
        sample = data.dataset.samples[data.dataset.kept[index]]
        if sample.pictures:
            return sample
    return None


def where_is(rows: Subset | PackedRows, number: int) -> str:
    """File and line of a training row's first line, or of all in a packed row."""
    if isinstance(rows, PackedRows):
        return ", ".join(where_is(rows.data, sample) for sample in rows.contents[number])
    return rows.dataset.where(rows.indices[number])


def with_sizes(config: StageConfig) -> StageConfig:
    """The config with its open flags filled in: from the file to start from, or MiniMind2-Small's.

    A run that is gone on with keeps its dropout; its sizes say which run that is.
    """
    known = {**SIZES, "dropout": 0.0}
    known |= {name: type(known[name])(value) for name, value in start_settings(config).items() if name in known}
    filled = replace(config, **{name: value for name, value in known.items() if getattr(config, name) == OPEN[name]})
    kept = kept_dropout(filled) if config.dropout == OPEN["dropout"] else None
    return filled if kept is None else replace(filled, dropout=kept)


def start_settings(config: StageConfig) -> dict:
    """What the file to start from says of its decoder, as arguments of MiniMindConfig."""
    if not config.start_path:
        return {}
    heads = config.num_attention_heads or SIZES["num_attention_heads"]  # which a .pth does not tell
    try:
        return decoder_arguments(read_sizes(config.start_path, heads))
    except UserError as error:
        raise UserError(f"--from_weight {error}") from error


def decoder_settings(config: StageConfig, say: Callable = print) -> dict:
    """Arguments of MiniMindConfig: the flags, and what these leave open as the file to start from says.

    A run that is gone on with keeps what it was built from. What comes out other than in the file is told.
    """
    said, kept = start_settings(config), kept_settings(config)
    flags = {name: getattr(config, name) for name in OPEN if getattr(config, name) != OPEN[name]}
    settings = {**(said if kept is None else kept), **flags}
    settings["use_moe"] = bool(settings.get("use_moe"))
    if kept is not None:
        made = decoder_arguments(MiniMindConfig(**settings).to_dict())
        for name in said.keys() - flags.keys():
            if made.get(name, said[name]) != said[name]:
                say(f"{name} {made[name]} as in this run's checkpoints, where {config.start_path} says {said[name]}")
    for name, value in flags.items():
        if said.get(name, value) != value:
            say(f"--{name} {value} where {config.start_path} says {said[name]}")
    return settings


def build_model(config: StageConfig, say: Callable = print) -> MiniMindForCausalLM:
    """The model that flags and start file describe, with its tower, filled from that file."""
    settings = decoder_settings(config, say)
    if config.with_vision:
        model = build_vlm(settings, config.vision_model)
    else:
        model = MiniMindForCausalLM(MiniMindConfig(**settings))
    if config.start_path and config.init_embeddings:
        raise UserError("--init_embeddings is for --from_weight none: weights bring their own embeddings")
    if config.start_path:
        may_miss, ignore = ((PROJECTOR_PREFIX,), ()) if config.with_vision else ((), (PROJECTOR_PREFIX,))
        say(load_weights(model, config.start_path, may_miss, ignore))
    elif config.init_embeddings:
        say(init_embeddings(model, config.init_embeddings))
    elif config.with_vision:
        say("the decoder starts from nothing: it will first have to learn to speak (--from_weight names a base)")
    return model


def load_data(
    config: StageConfig, processor: VLMProcessor, say: Callable = print, quarantine: Quarantine | None = None
) -> tuple[Subset, Subset | None]:
    """Training and validation samples, all checked and rendered. Raises DataError naming file, line and cure."""

    def read(path: str) -> ConversationDataset:
        rows = Path(config.save_dir) / "rows"
        samples = read_samples(path, config.images_path or None, rows, say, config.limits)
        folder = Path(config.save_dir) / "tokens"
        dataset = ConversationDataset(samples, processor, config.max_seq_len, quarantine, folder, say)
        say(f"{path}: {dataset.report}")
        return dataset

    data = read(config.data_path)
    if config.val_path:
        validation = read(config.val_path)
        return Subset(data, range(len(data))), Subset(validation, range(len(validation)))
    held_back = min(config.val_samples, len(data) // 10)
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed)).tolist()
    return Subset(data, sorted(shuffled[held_back:])), Subset(data, shuffled[:held_back]) if held_back else None


def worth_of_a_step(data: Subset, rows: int, global_batch: int) -> list[str]:
    """What a step learns from, where the order of the lines decides it: so that `shuf` does not change it in silence.

    rows: how many a batch is made of; fewer than the data's own where these are packed.
    """
    total, lines = int(data.dataset.conversations_a_row[data.indices].sum()), []
    if total > rows:
        lines.append(
            f"{rows:,} rows hold {total:,} conversations, {total / rows:.1f} a row: a step of {global_batch:,} rows is "
            f"worth about {global_batch * total / rows:,.0f} conversations"
        )
        if total > len(data):
            lines[0] += "; in another order of the file neighbours would share fewer rows"
    if apart := data.dataset.rows_apart:
        lines.append(
            f"{apart:,} rows show a picture that rows elsewhere in the file show, too: lines about one picture that "
            "stand together share a row, and a step of as many rows is then worth more"
        )
    return lines


def rows_of(config: StageConfig, data: Subset, say: Callable = print) -> tuple[Dataset, torch.Tensor]:
    """What a batch is made of, and how many tokens each has: the data's rows, or longer ones packed with them."""
    numbers = list(data.indices)
    lengths = data.dataset.lengths[numbers]
    if not config.pack_tokens:
        return data, torch.from_numpy(lengths)
    pictures = data.dataset.pictures_a_row[numbers]
    packed = PackedRows(data, lengths.tolist(), pictures.tolist(), config.pack_tokens, config.pack_pictures)
    say(f"{counted(len(packed), 'packed rows')} of {config.pack_tokens} tokens, {100 * packed.filled:.1f} % filled")
    return packed, packed.lengths


def encode_once(
    config: StageConfig, model: MiniMindVLM, data: Subset, validation: Subset | None,
    runtime: Runtime, say: Callable = print,
) -> None:  # fmt: skip
    """Take the frozen tower's outputs of both data sets' pictures, or their pixels, from files that all ranks fill."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with runtime.autocast():
            return model.encode_pictures(pixels.to(runtime.device)).float().cpu()

    sets = [subset.dataset for subset in (data, validation) if subset]
    for dataset in {id(one): one for one in sets}.values():
        cache_features(
            dataset, encode, f"{model.config.vision_sha256}:{runtime.dtype}", config.cache_features,
            Path(config.save_dir) / "features", runtime.rank, runtime.world_size, say,
        )  # fmt: skip
    runtime.wait_for_all()
    for dataset in sets:
        if dataset.features is not None:
            dataset.features.check_whole()


@torch.no_grad()
def tell_text_loss(model: MiniMindForCausalLM, data: Subset, say: Callable = print) -> None:
    """Say how well the weights know the words of this data, pictures left out. New words are told, never refused."""
    rows = [data.dataset.rendered(number) for number in data.indices[:CHECKED_SAMPLES]]
    loss, guess = float(model.eval()(**text_only(rows)).loss), math.log(model.config.vocab_size)
    say(f"text loss before training, pictures left out: {loss:.2f}")
    if loss > 0.8 * guess:
        say(
            f"these words are new to this decoder: text loss {loss:.1f} (a uniform guess has {guess:.1f}); it will "
            "learn them, and forget others unless old data is mixed in: docs/own_pictures.md"
        )
