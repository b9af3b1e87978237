"""The line is bounded, and clients take turns in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.serving import EngineFull
from ether_diffusion.serving.job import Job, Request
from ether_diffusion.serving.line import Line


def job(client: str) -> Job:
    return Job(Request(None, {}, (), None, None, client, None, None, None))


def drained(line: Line) -> list[Job]:
    taken = []
    while len(line):
        assert line.first() is not None
        taken.append(line.take())
    return taken


def test_requests_of_one_client_keep_their_order():
    line, jobs = Line(9), [job("a") for _ in range(4)]
    for each in jobs:
        line.add(each)
    assert drained(line) == jobs and line.first() is None


def test_a_client_with_many_requests_does_not_keep_others_waiting():
    line = Line(99)
    for client in "aaaaabbc":
        line.add(job(client))
    assert [each.request.client for each in drained(line)] == list("abcabaaa")


def test_a_full_line_says_so_and_takes_nothing():
    line = Line(2)
    for _ in range(2):
        line.add(job("a"))
    with pytest.raises(EngineFull, match="2 requests wait.*max_line=2"):
        line.add(job("b"))
    assert len(line) == 2


def test_a_request_is_taken_out_once():
    line, jobs = Line(9), [job("a"), job("a")]
    for each in jobs:
        line.add(each)
    assert line.remove(jobs[0]) and not line.remove(jobs[0])
    assert drained(line) == jobs[1:]
    assert not line.remove(job("nobody"))


@given(st.lists(st.sampled_from("aaaabc-"), max_size=40))
def test_nobody_is_overtaken_twice_by_the_same_client(plan):
    line, waiting, overtaken = Line(99), [], {}
    for client in plan:
        if client != "-":
            waiting.append(job(client))
            line.add(waiting[-1])
        elif waiting:
            taken = line.take()
            waiting.remove(taken)
            for each in {other.request.client: other for other in reversed(waiting)}.values():  # the first of each
                by = overtaken.setdefault(each, [])
                if taken.request.client != each.request.client:
                    assert taken.request.client not in by
                    by.append(taken.request.client)
                else:
                    by.clear()
