"""What happens when a process that reads data is lost: another goes on from the same step, a second loss ends it."""

import pytest

from trainer.guard.workers import WorkersLost, resilient_batches


def reader(*errors: Exception):
    """open_at for steps 0 to 5, of which each error is raised once, at step 3; and the steps at which it was opened."""
    opened, left = [], list(errors)

    def open_at(first: int):
        opened.append(first)
        for step in range(first, 6):
            if step == 3 and left:
                raise left.pop(0)
            yield step

    return open_at, opened


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_process_that_dies_with_a_batch_on_its_way_is_replaced_once(error, capsys):
    open_at, opened = reader(error)
    assert list(resilient_batches(open_at, 1)) == [1, 2, 3, 4, 5] and opened == [1, 3]
    assert "a process that reads data was lost" in capsys.readouterr().out
    open_at, opened = reader(error, error)
    with pytest.raises(WorkersLost, match="lost twice, the last time at step 3"):
        list(resilient_batches(open_at, 1))


@pytest.mark.parametrize(
    "error", [ConnectionError("Caught ConnectionError in DataLoader worker process 0."), OSError(5)]
)
def test_an_error_of_the_process_itself_is_not_taken_for_a_loss(error):
    open_at, opened = reader(error)
    with pytest.raises(type(error)):
        list(resilient_batches(open_at, 0))
    assert opened == [0]
