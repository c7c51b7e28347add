"""The data of a stage: samples checked and rendered before the first step, then one batch a step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from dataset.batching import PackedRows
from dataset.feature_cache import cache_features
from dataset.quarantine import QUARANTINE, Quarantine
from dataset.readers.opening import read_samples
from dataset.samples import Sample
from dataset.sources import open_sources
from dataset.split import split_rows
from dataset.step_batch import StepBatch, StepBatches
from dataset.vlm_dataset import ConversationDataset
from model.messages import UserError, counted
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor
from model.vision_encoder import pixel_statistics
from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.exams import NO_EXAMS, Exams
from trainer.guard.run_folder import RunFolder
from trainer.guard.signals import ignore_stopping
from trainer.guard.workers import POLL, ErrorsAsItems, resilient_batches
from trainer.mix import Mix, how_often, rows_of_sources, weights_of
from trainer.order import Order, micro_batches
from trainer.run import Run

EXAMPLES = 32  # samples among which one with a picture is looked for


@dataclass
class StageData:
    train: Subset  # of a ConversationDataset
    validation: Subset | None
    rows: Dataset  # what a batch is made of: the rows of `train`, or longer ones packed with them
    order: Order  # of a run that begins
    processor: VLMProcessor
    quarantine: Quarantine
    exams: Exams

    @classmethod
    def load(
        cls, config: StageConfig, processor: VLMProcessor, runtime: Runtime, exams: Exams = NO_EXAMS
    ) -> "StageData":
        """Read, check and render all samples, and print what there is.

        Raises:
            DataError: naming file, line and cure.
        """
        path = config.run_dir / QUARANTINE
        quarantine = Quarantine(path, bool(config.strict_data), config.max_bad_share, runtime.is_main)
        quarantine.begin(config.resumes)
        train, validation = load_data(config, processor, quarantine, runtime.print0)
        rows, lengths = rows_of(config, train, runtime)
        quarantine.samples_a_row = len(train) / len(rows)
        split = (config.batch_size, config.accumulation_steps, runtime.world_size)
        order = Order(lengths, *split, config.epochs, config.seed, Mix.of(train, rows))
        for line in how_often(train, order.mix, order.rows_per_epoch):
            runtime.print0(line)
        steps, step = counted(order.total_steps, "steps"), counted(order.global_batch, "rows")
        runtime.print0(f"{steps} of {step} in passes of {config.token_budget:,} tokens at most")
        for line in worth_of_a_step(train, len(rows), order.global_batch):
            runtime.print0(line)
        return cls(train, validation, rows, order, processor, quarantine, exams)

    def encode_pictures(self, config: StageConfig, model: MiniMindVLM, runtime: Runtime) -> None:
        """Take the frozen tower's outputs of all pictures, or their pixels, from files that all ranks fill."""

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            with runtime.autocast():
                return model.encode_pictures(pixels.to(runtime.device)).float().cpu()

        looks = (*pixel_statistics(model.config.vision_config), model.config.before_last_norm)
        datasets = {id(subset.dataset): subset.dataset for subset in (self.train, self.validation) if subset}
        for dataset in datasets.values():
            cache_features(
                dataset, encode, f"{model.config.vision_sha256}:{looks}:{runtime.dtype}", config.cache_features,
                Path(config.save_dir) / "features", runtime.rank, runtime.world_size, runtime.print0,
            )  # fmt: skip
        runtime.wait_for_all()
        for dataset in datasets.values():
            if dataset.features is not None:
                dataset.features.check_whole()

    def batches(self, run: Run) -> Iterator[StepBatch]:
        """This rank's part of each step, from the run's step on; what proves to be damaged in it is noted."""
        rows = StepBatches(self.rows, self.processor.padding_id)
        for batch in resilient_batches(partial(read_batches, rows, run), run.state.step):
            self.quarantine.record(batch)
            yield batch

    def where(self, row: int) -> str:
        """File and line of a row's first sample, or of all in a packed row."""
        if isinstance(self.rows, PackedRows):
            return ", ".join(self._line(number) for number in self.rows.contents[row])
        return self._line(row)

    def _line(self, number: int) -> str:
        return self.train.dataset.where(self.train.indices[number])

    def example(self) -> Sample | None:
        """The first training sample that shows a picture."""
        dataset = self.train.dataset
        samples = (dataset.samples[dataset.kept[index]] for index in self.train.indices[:EXAMPLES])
        return next((sample for sample in samples if sample.pictures), None)

    def note_left_out(self, folder: RunFolder) -> str:
        """Put the counts of samples that were left out into status.json; returns them as a line, empty without any."""
        if not self.quarantine.is_main:
            return ""
        folder.update(**{f"samples_{kind}": count for kind, count in self.quarantine.counts().items()})
        return self.quarantine.summary()


def load_data(
    config: StageConfig, processor: VLMProcessor, quarantine: Quarantine, say: Callable = print
) -> tuple[Subset, Subset | None]:
    """Training and validation samples, all checked and rendered."""

    folder = Path(config.save_dir)

    def open_one(path: str) -> Sequence[Sample]:
        samples = read_samples(path, config.read_options, folder / "rows", say)
        say(samples.describe())
        return samples

    def read(path: str, flag: str) -> ConversationDataset:
        samples = open_sources(path, open_one, flag)
        dataset = ConversationDataset(samples, processor, config.max_seq_len, quarantine, folder / "tokens", say)
        say(f"{path}: {dataset.report}")
        return dataset

    data = read(config.data_path, "--data_path")
    if config.val_path:
        validation = read(config.val_path, "--val_path")
        return Subset(data, range(len(data))), Subset(validation, range(len(validation)))
    train, validation = split_rows(data.checked, config.val_samples, config.seed, say)
    if len(validation):
        say(f"{counted(len(train), 'rows')} to train on, {len(validation):,} held back for validation")
    return Subset(data, train), Subset(data, validation) if len(validation) else None


def rows_of(config: StageConfig, data: Subset, runtime: Runtime) -> tuple[Dataset, torch.Tensor]:
    """What a batch is made of, and how many tokens each has: the data's rows, or longer ones packed with them."""
    numbers = np.asarray(data.indices)
    lengths = data.dataset.lengths[numbers]
    if not config.pack_tokens:
        return data, torch.from_numpy(lengths)
    views = data.dataset.views_a_row[numbers]
    apart = rows_of_sources(data) if weights_of(data) else ()
    packed = PackedRows(data, lengths.tolist(), views.tolist(), config.pack_tokens, config.pack_pictures, apart)
    rows = counted(len(packed), "packed rows")
    runtime.print0(f"{rows} of {config.pack_tokens} tokens, {100 * packed.filled:.1f} % filled")
    return packed, packed.lengths


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


def read_batches(rows: StepBatches, run: Run, first_step: int) -> Iterator[StepBatch | UserError]:
    """This rank's part of each step from one on, cut, decoded and counted by worker processes."""
    config, runtime = run.config, run.runtime
    return iter(
        DataLoader(
            ErrorsAsItems(rows),
            batch_size=None,  # an item is a step
            sampler=micro_batches(run.order, runtime.rank, config.token_budget, first_step),
            num_workers=config.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own: drawing from the stream of dropout would make resuming differ
            pin_memory=runtime.device.type == "cuda",
            worker_init_fn=ignore_stopping,
            timeout=POLL if config.num_workers else 0,
        )
    )


def _as_it_is(batch: StepBatch | UserError) -> StepBatch | UserError:
    return batch
