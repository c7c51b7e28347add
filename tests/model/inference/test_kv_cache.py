"""Rows of keys and values that join, grow, move and leave; what is remembered, and what goes first."""

import random

import pytest
import torch

from model.inference.kv_cache import STEP, KVCache, LRUCache, common_length

SHAPE = (2, 2, 1, 2, 0, 3)  # layers, keys and values, rows, heads, positions, head_dim


def some_states(length: int) -> torch.Tensor:
    return torch.randn(*SHAPE[:4], length, SHAPE[5])


def one_row(states: torch.Tensor, room: int) -> KVCache:
    cache = KVCache(torch.zeros(*SHAPE[:4], states.shape[-2] + room, SHAPE[5]))
    cache.states[..., : states.shape[-2], :] = states
    cache.length = states.shape[-2]
    return cache


def check(cache: KVCache, expected: list[torch.Tensor]) -> None:
    longest = max(row.shape[-2] for row in expected)
    assert cache.length == longest and cache.paddings == [longest - row.shape[-2] for row in expected]
    assert (cache.padding is None) == (not any(cache.paddings))
    for number, row in enumerate(expected):
        assert torch.equal(cache.filled_of(number), row)
    assert cache.storage[:, :, : len(expected)].isfinite().all()  # also what is masked


def step(cache: KVCache, expected: list[torch.Tensor], broken: int | None) -> list[torch.Tensor]:
    """What a step of the decoder writes; of a broken row it is no number."""
    new = [some_states(1) for _ in expected]
    if broken is not None:
        new[broken] = new[broken] * float("nan")
    cache.make_room(cache.length + 1)
    cache.states[..., cache.length : cache.length + 1, :] = torch.cat(new, 2)
    cache.length += 1
    return [torch.cat([row, column], -2) for row, column in zip(expected, new, strict=True)]


@pytest.fixture
def memory_of_others(monkeypatch):
    """New memory holds whatever it held before: here what would show."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, float("nan")))


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_what_each_would_be_alone(seed, memory_of_others):
    torch.manual_seed(seed)
    chance, cache, expected = random.Random(seed), None, []
    for _ in range(60):
        what = chance.choice(("join", "step", "step", "leave", "order", "break"))
        if what == "join" or not expected:
            states, room = some_states(chance.randrange(1, 40)), chance.choice((0, 5, STEP))
            if expected:
                cache.join(one_row(states, room))
            else:
                cache = one_row(states, room)
            expected.append(states)
        elif what in ("leave", "order", "break"):
            rows = list(range(len(expected)))
            if what == "break":  # a row whose numbers are none leaves at once, and harms nobody later
                broken = chance.choice(rows)
                expected = step(cache, expected, broken)
                rows.remove(broken)
            elif what == "leave":
                rows = rows[:-1] if len(rows) < 3 else [0, len(rows) - 1, *rows[2:-1]]
            else:
                rows = [chance.choice(rows) for _ in range(min(6, len(rows) + 1))]  # in any order, some twice
            if rows:
                cache.keep(rows)
            expected = [expected[row] for row in rows]
        else:
            expected = step(cache, expected, None)
        if expected:
            check(cache, expected)


def test_a_join_copies_no_other_row():
    """The storage of a cache that has room stays where it is, whoever joins or leaves."""
    cache = one_row(some_states(30), STEP)
    for _ in range(7):
        cache.join(one_row(some_states(20), 0))
    place = cache.storage.data_ptr()
    cache.keep([*range(1, 8)])
    for _ in range(40):
        cache.keep([0, 6, *range(2, 6)])
        cache.join(one_row(some_states(25), 0))
        cache.make_room(cache.length + 1)
        cache.length += 1
    assert cache.storage.data_ptr() == place


def test_the_least_recently_used_goes_first():
    memory = LRUCache(10)
    for name in "abc":
        memory.put(name, name.upper(), 3)
    assert memory.get("a") == "A"
    memory.put("d", "D", 3)
    assert memory.keys() == ["c", "a", "d"] and memory.get("b") is None and memory.size == 9
    memory.put("a", "A2", 1)
    assert memory.size == 7 and memory.get("a") == "A2"
    memory.put("huge", "H", 11)
    assert memory.get("huge") is None and memory.size == 7
    memory.drop("c")
    assert memory.size == 4


def test_common_length():
    one, two = torch.tensor([1, 2, 3]).numpy(), torch.tensor([1, 2, 4, 5]).numpy()
    assert common_length(one, two) == 2 and common_length(one, one) == 3 and common_length(one[:0], two) == 0
