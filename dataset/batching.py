"""Rows of several conversations: what they begin with, a picture above all, is computed once for all of them."""

from collections.abc import Hashable, Iterable, Iterator, Sequence

from model.processing import Rendered

SHARED = 0.25  # of the shorter of two conversations: what they must share to be put into one row


def grouped(conversations: Iterable[tuple[int, Hashable, Rendered]], max_length: int) -> Iterator[tuple[int, Rendered]]:
    """(number, pictures, conversation) triples to (number of a row's first conversation, row).

    Neighbours are put into one row where they show the same pictures and share enough of their beginnings, as long
    as the row stays within max_length tokens.
    """
    group: list[Rendered] = []
    number = pictures = shared = None
    for next_number, next_pictures, rendered in conversations:
        if group and next_pictures == pictures:
            common = min(shared, common_prefix(group[0], rendered))
            length = common + sum(len(row.input_ids) - common for row in (*group, rendered))
            worth = common >= SHARED * min(len(group[0].input_ids), len(rendered.input_ids))
            if worth and length <= max_length:
                group.append(rendered)
                shared = common
                continue
        if group:
            yield number, share_prefix(group, shared)
        group, number, pictures, shared = [rendered], next_number, next_pictures, len(rendered.input_ids)
    if group:
        yield number, share_prefix(group, shared)


def common_prefix(first: Rendered, second: Rendered) -> int:
    """Tokens with which both begin, and after which each has at least one more that is not learnt.

    What is learnt stays in the branches, and each branch's first learnt token is predicted from inside the branch.
    """
    most = min(first.trained.index(True), second.trained.index(True)) - 1
    columns = (first.input_ids[:most], second.input_ids, first.image_mask, second.image_mask)
    pairs = enumerate(zip(*columns, strict=False))
    return next((n for n, (a, b, shown, shown_too) in pairs if a != b or shown != shown_too), max(most, 0))


def share_prefix(rows: Sequence[Rendered], shared: int) -> Rendered:
    """One row for several: the `shared` tokens that they begin with, once, then the rest of each as its own branch."""
    first = rows[0]
    if len(rows) == 1:
        return first
    merged = Rendered(first.input_ids[:shared], first.trained[:shared], first.image_mask[:shared], [0] * shared)
    for number, row in enumerate(rows, 1):
        merged.input_ids += row.input_ids[shared:]
        merged.trained += row.trained[shared:]
        merged.image_mask += row.image_mask[shared:]
        merged.branch += [number] * (len(row.input_ids) - shared)
    return merged
