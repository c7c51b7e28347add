"""A folder of shards from nothing to its index, however often it is stopped on the way.

survey.npz      what the first look found, and what it is of; gone when all is done
*-of-*.parquet  the shards, each under its name only when it is whole
left_out.jsonl  {"kind", "where", "reason"} a line, as a run's quarantine.jsonl
index.json      what there is, and what it was made of; written last
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pyarrow

from dataset.quarantine import Quarantine
from dataset.samples import BAD, Rejected, Sample
from model.files import file_sha256, sync_to_disk, written_aside
from model.messages import NO_ROOM, UserError, counted
from model.process_lock import ProcessLock
from model.progress import Progress
from scripts.data.prepare.columns import Columns
from scripts.data.prepare.first_look import Survey, Surveyor
from scripts.data.prepare.plan import Options, Plan, Shard, make_plan
from scripts.data.prepare.shards import Shards

FORMAT = "minimind-vlm shards 1"  # raise it with any change of what is written
SURVEY, INDEX, LEFT_OUT, LOCK = "survey.npz", "index.json", "left_out.jsonl", ".lock"
SHARD = re.compile(r"(train|held_out)-\d{5}-of-\d{5}\.parquet")
BEGUN = re.compile(rf"{re.escape(LEFT_OUT)}|\.lock.*|\..*\.tmp")  # what may lie there before the survey does
DUPLICATE = "duplicate"  # a kind of Rejected
MARGIN = 1.05  # of the bytes that are needed


class Preparation:
    """`with Preparation(...) as preparation: preparation.run()`; inside, the folder is this process's."""

    def __init__(self, folder: Path, samples: Sequence[Sample], options: Options, max_bad_share: float):
        self.folder, self.samples, self.options, self.max_bad_share = folder, samples, options, max_bad_share
        facts = {"format": FORMAT, "data": samples.identity(), **{f"--{k}": v for k, v in asdict(options).items()}}
        self.facts = json.loads(json.dumps(facts))
        self.lock, self.needed = ProcessLock(folder / LOCK), 0.0  # bytes, about; 0: not known yet

    def __enter__(self) -> "Preparation":
        """Raises UserError where the folder is another's: nothing in it is changed."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output {self.folder} is no folder: name another")
        index = self.index() is not None or (self.folder / SURVEY).exists()
        names = [] if index or not self.folder.exists() else sorted(path.name for path in self.folder.iterdir())
        if strange := [name for name in names if not BEGUN.fullmatch(name)]:
            raise UserError(
                f"--output {self.folder} holds {strange[0]}, which this command has not made: name a new folder"
            )
        if not self.lock.acquire():
            raise UserError(f"another process prepares {self.folder}: wait until it is done, or name another folder")
        for litter in self.folder.glob(".*.tmp"):  # of a process that was killed
            litter.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def index(self) -> dict | None:
        """None where there is none that this command has written."""
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        made_by = index.get("made_by") if isinstance(index, dict) else None
        return index if isinstance(made_by, dict) and "format" in made_by else None

    def run(self, replace: bool = False) -> None:
        """Make what is missing.

        replace: after deleting everything that an earlier run has made. Raises UserError, DataError, OSError.
        """
        try:
            if replace:
                self._clear()
            self._make()
        except OSError as error:
            if error.errno in NO_ROOM:
                raise self._no_room(error) from error
            raise

    def _make(self) -> None:
        index = self.index()
        if index is not None:
            self._refuse_others(index["made_by"])
            if all(self._has(shard) for shard in index["shards"]):
                (self.folder / SURVEY).unlink(missing_ok=True)
                print(f"{self.folder} is complete: {summary(index)}")
                return
        survey = self._survey()
        (self.folder / INDEX).unlink(missing_ok=True)
        plan = make_plan(survey, self.options)
        index = self._index(survey, plan, self._write(survey, plan))
        self._write_left_out(survey, plan)
        with written_aside(self.folder / INDEX) as aside:
            aside.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (self.folder / SURVEY).unlink()
        print(f"{self.folder}: {summary(index)}")

    def _clear(self) -> None:
        """The survey goes last: as long as it is there the folder is known as ours."""
        if self.folder.joinpath(INDEX).exists() and not self.folder.joinpath(SURVEY).exists():
            (self.folder / SURVEY).touch()
        names = [path.name for path in self.folder.iterdir() if SHARD.fullmatch(path.name)]
        for name in (INDEX, *names, LEFT_OUT, SURVEY):
            (self.folder / name).unlink(missing_ok=True)
        sync_to_disk(self.folder)

    def _refuse_others(self, facts: dict) -> None:
        """Raises UserError where the folder was made of other data or with other options, naming them."""
        wrong = [
            f"{name} was {_short(facts.get(name))} and is {_short(self.facts.get(name))}"
            for name in {**facts, **self.facts}
            if facts.get(name) != self.facts.get(name)
        ]
        if wrong:
            raise UserError(
                f"{self.folder} was made otherwise: {'; '.join(wrong)}. Name another folder with --output, or make "
                "this one anew with --replace"
            )

    def _has(self, shard: dict) -> bool:
        """Whether a shard is as the index says."""
        path = self.folder / shard["file"]
        return path.is_file() and path.stat().st_size == shard["bytes"] and file_sha256(path) == shard["sha256"]

    def _survey(self) -> Survey:
        """What an earlier start has found; if there is nothing, a look at everything, which is kept."""
        if found := Survey.read(self.folder / SURVEY):
            survey, facts = found
            self._refuse_others(facts)
            if changed := survey.changed_picture():
                raise UserError(f"{changed} has changed since it was looked at: start again with --replace")
            return survey
        quarantine = Quarantine(self.folder / LEFT_OUT, strict=False, max_share=self.max_bad_share)
        quarantine.begin(resumes=False)
        survey = Surveyor(self.samples, quarantine).run()
        if not len(survey.numbers):
            raise UserError(f"no sample of {len(self.samples):,} can be used: {self.folder / LEFT_OUT} says why")
        survey.write(self.folder / SURVEY, self.facts)
        return survey

    def _write(self, survey: Survey, plan: Plan) -> list[dict]:
        """The facts of all shards for the index, those that are missing now written."""
        columns = Columns(**json.loads(survey.columns.tobytes()))
        made_by = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        shards = Shards(self.folder, self.samples, survey, columns, made_by)
        whole = {shard.name for shard in plan.shards if shards.is_whole(shard)}
        for path in list(self.folder.iterdir()):
            if SHARD.fullmatch(path.name) and path.name not in whole:
                path.unlink()
        missing = [shard for shard in plan.shards if shard.name not in whole]
        if whole:
            print(f"there and whole: {len(whole):,} of {counted(len(plan.shards), 'shards')}")
        self.needed = _bytes_of(missing)
        if self.needed > shutil.disk_usage(self.folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with Progress(sum(len(shard.rows) for shard in missing), "writing", "sample") as progress:
            for number, shard in enumerate(missing):
                self.needed = _bytes_of(missing[number:])
                shards.write(shard, progress.update)
        return [self._facts_of(shard) for shard in plan.shards]

    def _facts_of(self, shard: Shard) -> dict:
        path = self.folder / shard.name
        facts = {"rows": len(shard.rows), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return {"file": shard.name, **facts}

    def _no_room(self, error: OSError) -> UserError:
        free = f"{shutil.disk_usage(self.folder).free / 1e6:,.1f} MB are free"
        needed = f"about {self.needed / 1e6:,.1f} MB are still needed, " if self.needed else ""
        return UserError(
            f"{self.folder} cannot take it ({os.strerror(error.errno)}): {needed}{free}. Make room and give the same "
            "command, which keeps what is done; or name a folder on another disk"
        )

    def _index(self, survey: Survey, plan: Plan, shards: list[dict]) -> dict:
        rejected, kept = survey.rejections(), sum(shard["rows"] for shard in shards)
        bad = sum(one.kind == BAD for one in rejected)
        counts = {
            "samples": len(self.samples), "bad": bad, "dropped": len(rejected) - bad,
            "duplicates": len(plan.duplicates), "train": kept - plan.held_out, "held_out": plan.held_out,
        }  # fmt: skip
        return {"made_by": self.facts, "pyarrow": pyarrow.__version__, "counts": counts, "shards": shards}

    def _write_left_out(self, survey: Survey, plan: Plan) -> None:
        """Rejected samples, then duplicates where they are left out, each with the one that says the same."""
        left_out = chain(survey.rejections(), self._left_out_duplicates(survey, plan))
        records = ({"kind": kind, "where": where, "reason": reason} for where, reason, kind in left_out)
        with written_aside(self.folder / LEFT_OUT) as aside, aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _left_out_duplicates(self, survey: Survey, plan: Plan) -> Iterator[Rejected]:
        if self.options.dedup == "exact":
            for place, first in survey.numbers[plan.duplicates].tolist():
                reason = f"it says and shows the same as {self.samples.where(first)}"
                yield Rejected(self.samples.where(place), reason, DUPLICATE)


def _bytes_of(shards: Sequence[Shard]) -> float:
    return sum(shard.size for shard in shards) * MARGIN


def summary(index: dict) -> str:
    """What is there, in a line."""
    counts, dedup = index["counts"], index["made_by"]["--dedup"]
    size = sum(shard["bytes"] for shard in index["shards"])
    line = f"{counted(counts['train'], 'samples')} to train on"
    if counts["held_out"]:
        line += f", {counts['held_out']:,} held out"
    line += f"; {counted(len(index['shards']), 'shards')}, {size / 1e6:,.1f} MB"
    if counts["duplicates"]:
        same = f"{counted(counts['duplicates'], 'samples')} that repeat an earlier one"
        line += f"; left out {same}" if dedup == "exact" else f"; with {same} (--dedup exact leaves them out)"
    if left_out := counts["bad"] + counts["dropped"]:
        line += f"; left out {counted(left_out, 'bad samples')}, named in {LEFT_OUT}"
    return line


def _short(value: object) -> str:
    """A fact in a message; a list's digests at a length that can be compared by eye."""
    words = [str(part)[:12] if len(str(part)) == 64 else str(part) for part in value] if isinstance(value, list) else []
    return "[" + ", ".join(words) + "]" if words else "nothing" if value is None else str(value)
