"""Jobs of the page: one after the other in a lane, followed by whoever knows the address, cancelled alone."""

import threading

import pytest

from ether_diffusion.demo.board import LONGEST_LINE, MOST_KEPT, MOST_UNFINISHED, Board, Waiting
from ether_diffusion.demo.jobs import Cancelled, Failed
from ether_diffusion.errors import InputError


@pytest.fixture
def board():
    board = Board("images", "trainings")
    yield board
    board.close()


def held(gate: threading.Event, *news: str):
    """Work that tells its news, and before the last waits for a gate."""

    def work():
        yield from news[:-1]
        assert gate.wait(10)
        yield news[-1]

    return work


def test_a_job_is_found_by_its_address_and_keeps_its_result(board):
    gate = threading.Event()
    job = board.submit("images", "generate", "me", held(gate, "half", "whole"))
    followed = board.find(job.address).follow()
    assert next(each for each in followed if not isinstance(each, Waiting)) == "half"
    followed.close()  # who looks may go: the job goes on
    gate.set()
    assert list(job.follow())[-1] == "whole"
    assert list(job.follow()) == ["whole"]
    assert board.latest("generate", "me") is job
    assert board.latest("control", "me") is board.latest("generate", "you") is board.find("elsewhere") is None


def test_lanes_are_apart_and_the_place_in_line_is_told(board):
    gate = threading.Event()
    first, second, third = (board.submit("images", "generate", "me", held(gate, str(k))) for k in range(3))
    other = board.submit("trainings", "train", "me", lambda: iter_of("trained"))
    assert list(other.follow())[-1] == "trained"
    assert next(third.follow()) == Waiting(2)
    second.cancel()
    with pytest.raises(Cancelled):
        list(second.follow())
    assert next(third.follow()) == Waiting(1)
    gate.set()
    assert list(first.follow())[-1] == "0" and list(third.follow())[-1] == "2"


def test_a_result_comes_when_nothing_comes_after_it(board):
    looked, gate = threading.Event(), threading.Event()

    class Result:
        is_result = True

    result = Result()

    def work():
        yield "began"
        assert looked.wait(10)
        yield result
        assert gate.wait(10)

    job = board.submit("images", "generate", "me", work)
    followed = job.follow()
    assert next(each for each in followed if not isinstance(each, Waiting)) == "began"
    looked.set()
    threading.Timer(0.3, gate.set).start()
    assert list(followed) == [result] and job.done


def test_cancelling_closes_the_work(board):
    gate, closed = threading.Event(), threading.Event()

    def work():
        try:
            yield "began"
            while True:
                gate.wait(0.01)
                yield "goes on"
        finally:
            closed.set()

    job = board.submit("images", "generate", "me", work)
    assert any(each == "goes on" for each in job.follow())
    job.cancel()
    with pytest.raises(Cancelled):
        list(job.follow())
    assert closed.wait(10)


def test_an_error_is_told_and_the_next_job_runs(board):
    def refuses():
        yield "began"
        raise InputError("Prompt: is empty")

    def breaks():
        yield "began"
        raise ZeroDivisionError("what nobody thought of")

    jobs = [board.submit("images", "generate", "me", work) for work in (refuses, breaks, lambda: iter_of("fine"))]
    with pytest.raises(InputError, match="Prompt: is empty"):
        list(jobs[0].follow())
    with pytest.raises(Failed, match="ZeroDivisionError: what nobody thought of"):
        list(jobs[1].follow())
    assert list(jobs[2].follow())[-1] == "fine"


def test_one_owner_cannot_fill_the_line(board):
    gate = threading.Event()
    for _ in range(MOST_UNFINISHED):
        board.submit("images", "generate", "me", held(gate, "one"))
    with pytest.raises(InputError, match=f"{MOST_UNFINISHED} of your jobs"):
        board.submit("trainings", "train", "me", held(gate, "one"))
    other = board.submit("images", "generate", "you", held(gate, "one"))
    gate.set()
    assert list(other.follow())[-1] == "one"


def test_the_line_has_an_end(board):
    gate = threading.Event()
    for k in range(LONGEST_LINE):
        board.submit("images", "generate", f"owner {k}", held(gate, "one"))
    with pytest.raises(InputError, match=f"{LONGEST_LINE} jobs are in line, and no more fit"):
        board.submit("images", "generate", "one more", held(gate, "one"))
    gate.set()


def test_finished_jobs_are_forgotten_the_oldest_first(board):
    jobs = []
    for _ in range(MOST_KEPT + 5):
        jobs.append(board.submit("images", "generate", "me", lambda: iter_of("one")))
        assert list(jobs[-1].follow())[-1] == "one"
    assert board.find(jobs[0].address) is None and board.find(jobs[-1].address) is jobs[-1]
    assert sum(board.find(job.address) is not None for job in jobs) <= MOST_KEPT + 1


def iter_of(*news: str):
    yield from news
