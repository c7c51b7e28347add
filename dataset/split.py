"""Which rows are held back for validation: whole groups of rows about the same pictures, chosen by what these show.

A picture never stands on both sides, also where its bytes lie under two names, or where a row shows several pictures.
Groups are held back in the order of a hash of their content and the seed. So sides depend neither on the order of a
file nor on its names, and more pictures never bring one that was trained on into validation, as long as as many rows
are held back as before.
"""

import hashlib
from collections.abc import Callable

import numpy as np

from dataset.check import CheckedData
from model.messages import counted

MOST = 10  # at most one row of so many is held back


def print_of_text(text: bytes) -> int:
    """Of a row without pictures, 64 bits: the same text or tokens, the same print."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def split_rows(
    checked: CheckedData, wanted: int, seed: int, say: Callable = lambda _: None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on, and of those held back, both in order: `wanted` or a few more, at most a tenth.

    say: called with a line where rows are wanted, but none can be held back.
    """
    contents, starts = contents_of(checked)
    rows, groups = len(starts) - 1, groups_of(contents, starts)
    held = hold_back(contents, starts, groups, min(wanted, rows // MOST), rows // MOST, seed)
    if wanted and not held.any():
        fewest = counted(int(np.bincount(groups).min()), "rows")
        say(
            f"no row is held back for validation: of {counted(rows, 'rows')} at most {rows // MOST} may be, but the "
            f"smallest group about the same pictures has {fewest}: give --val_path, or more data"
        )
    # Arrays: of a list every reading process would get its own copy, a page with each number that it looks at.
    return np.flatnonzero(~held), np.flatnonzero(held)


def contents_of(checked: CheckedData) -> tuple[np.ndarray, np.ndarray]:
    """Prints of what the rows show, uint64, and where each row's begin, int64 [rows + 1]; one or more a row.

    A row without pictures has the print of its tokens.
    """
    pictures = np.diff(checked.starts)
    starts = np.append(0, np.maximum(pictures, 1).cumsum())
    contents = np.zeros(starts[-1], np.uint64)
    shows = pictures > 0
    contents[shows.repeat(np.diff(starts))] = checked.prints[checked.shown]
    for row in np.flatnonzero(~shows).tolist():
        contents[starts[row]] = print_of_text(checked.ids[checked.offsets[row] : checked.offsets[row + 1]].tobytes())
    return contents, starts


def groups_of(contents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The number of each row's group, int64 [rows], from 0: rows with a content in common, or linked by other rows."""
    _, numbers = np.unique(contents, return_inverse=True)
    label = np.arange(len(contents))  # of each different content, a smaller one that it is linked to
    first = numbers[starts[:-1]]
    one, other = first.repeat(np.diff(starts)), numbers
    while (differ := label[one] != label[other]).any():
        one, other = one[differ], other[differ]
        pair = label[one], label[other]
        np.minimum.at(label, np.maximum(*pair), np.minimum(*pair))
        while (label[label] != label).any():
            label = label[label]
    return np.unique(label[first], return_inverse=True)[1]


def hold_back(
    contents: np.ndarray, starts: np.ndarray, groups: np.ndarray, wanted: int, most: int, seed: int
) -> np.ndarray:
    """Which rows are held back, bool [rows]: groups in the order of their hash, until `wanted` rows are reached.

    A group with which there would be more than `most` is passed over.
    """
    sizes = np.bincount(groups)
    keys = np.full(len(sizes), np.iinfo(np.uint64).max)
    np.minimum.at(keys, groups.repeat(np.diff(starts)), mixed(contents, seed))  # the least of a group's contents
    chosen, held = np.zeros(len(sizes), bool), 0
    for group in np.argsort(keys, kind="stable").tolist():
        if held >= wanted:
            break
        if held + sizes[group] <= most:
            chosen[group] = True
            held += int(sizes[group])
    return chosen[groups]


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Hashes of uint64 values and a seed, uint64 of the same shape, by splitmix64: the same on every machine."""
    values = values + np.uint64(seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ values >> np.uint64(shift)) * np.uint64(factor)
    return values ^ values >> np.uint64(31)
