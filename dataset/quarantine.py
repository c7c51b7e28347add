"""What a run leaves out: rejected samples are counted and named, and end the run where too many of them are bad.

bad       a line or picture that cannot be used, found before the first step: left out
dropped   sound, but too long for its pictures or without a token to learn: left out, and no fault of the file
damaged   a picture that turns out broken when it is decoded in training: its row stays in its place with all labels
          ignored and its pictures grey, so every rank takes the same steps, and the order of the samples stays a
          function of the seed alone
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dataset.samples import BAD, DAMAGED, DROPPED, BadSample, DataError, Rejected
from dataset.step_batch import StepBatch
from model.messages import counted

QUARANTINE = "quarantine.jsonl"  # in the run's folder: {"kind", "where", "reason"} a line
MAX_BAD_SHARE = 0.05
LEAST = 10  # bad samples before they are judged ahead of the end
SHOWN = 3  # reasons that a refusal names


class Quarantine:
    """Counts what is left out of all files of a run, and writes it down in `path`, if there is one.

    strict: nothing is left out, the first bad sample is raised. max_share: of the samples of a file, how many may be
    bad. Every rank reads the whole files and finds the same; only the main one writes those down.
    """

    def __init__(
        self, path: Path | None = None, strict: bool = True, max_share: float = MAX_BAD_SHARE, is_main: bool = True
    ):
        self.path, self.strict, self.max_share, self.is_main = path, strict, max_share, is_main
        self.bad = self.dropped = 0
        self.damaged: set[str] = set()  # where; by this rank since its start
        self.samples_a_row = 1.0  # of a step batch
        self._rows = 0

    def begin(self, resumes: bool) -> None:
        """Start the file; a run that continues keeps what was found while it trained, the rest is found again."""
        if self.path is None or not self.is_main:
            return
        kept = [line for line in self._lines() if resumes and json.loads(line)["kind"] == DAMAGED]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def reject(self, rejected: Rejected, bad: Sequence[Rejected], samples: int) -> None:
        """Note a sample that the check of a file leaves out.

        bad: the file's bad samples so far, this one included if it is bad; samples: of the file.

        Raises:
            BadSample: it is bad and the run is strict.
            DataError: too many are bad, however sound the rest of the file may be; the first reasons are named.
        """
        if rejected.kind == DROPPED:
            self.dropped += 1
        elif self.strict:
            raise BadSample(*rejected)
        else:
            self.bad += 1
        if self.is_main:
            self._write(rejected)
        if len(bad) >= LEAST:
            self.refuse_too_many(bad, len(bad), samples, "at least ")

    def refuse_too_many(self, first: Sequence[Rejected], bad: int, seen: int, at_least: str = "") -> None:
        """Raises DataError where more than the share is bad; at the end of a file however few it has.

        at_least: what the message says before their number while there may be more.
        """
        if bad > self.max_share * seen:
            named = f"; {self.path} names them" if self.path else ""
            raise DataError(
                f"{at_least}{bad:,} of {seen:,} samples are bad, more than --max_bad_share {self.max_share:g} allows. "
                f"The first: {'; '.join(map(str, first[:SHOWN]))}. Mend or delete them, or allow more{named}"
            )

    def record(self, step: StepBatch) -> StepBatch:
        """Note the rows of a step whose pictures turned out damaged.

        Raises:
            BadSample: the run is strict.
            DataError: too many of this rank's samples so far were damaged.
        """
        self._rows += step.counts.rows
        for rejected in step.rejected:
            if self.strict:
                raise BadSample(*rejected)
            if rejected.where not in self.damaged:
                self.damaged.add(rejected.where)
                self._write(rejected)
            if len(self.damaged) >= LEAST:
                self.refuse_too_many([rejected], len(self.damaged), round(self._rows * self.samples_a_row))
        return step

    def counts(self) -> dict[str, int]:
        """Of each kind; the damaged ones of all ranks, and of all starts of a run that was resumed."""
        records = [json.loads(line) for line in self._lines()]
        damaged = {record["where"] for record in records if record["kind"] == DAMAGED}
        return {BAD: self.bad, DROPPED: self.dropped, DAMAGED: len(damaged)}

    def summary(self) -> str:
        """One line for the end of a run, empty where nothing was left out."""
        counts = self.counts()
        if not any(counts.values()):
            return ""
        return (
            f"left out: {counted(counts[BAD], 'bad samples')}, {counts[DROPPED]:,} that do not fit, "
            f"{counts[DAMAGED]:,} with a picture that was damaged; named in {self.path}"
        )

    def _lines(self) -> list[str]:
        """Of the file; a killed run may have left half of one."""
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path and self.path.is_file() else []
        return [line for line in lines if line.endswith("}")]

    def _write(self, rejected: Rejected) -> None:
        if self.path is not None:
            record = {"kind": rejected.kind, "where": rejected.where, "reason": rejected.reason}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
