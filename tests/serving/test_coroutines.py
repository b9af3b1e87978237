"""A coroutine runs only between being resumed and its next pause, on a thread of its own."""

import threading

import pytest

from ether_diffusion.serving.coroutines import Coroutine, Stop


def test_values_go_in_and_out_in_turn():
    def body():
        got = Coroutine.current().pause("first")
        got = Coroutine.current().pause(got + 1)
        return got * 2

    coroutine = Coroutine(body, "test")
    assert coroutine.resume() == "first"
    assert coroutine.resume(1) == 2
    assert coroutine.resume(21) is None
    assert coroutine.ended and coroutine.result == 42 and coroutine.error is None


def test_only_one_of_many_runs_at_a_time_in_the_order_in_which_they_are_resumed():
    running, order = [], []

    def body(k):
        for _ in range(20):
            running.append(k)
            assert running == [k]
            running.remove(k)
            order.append(k)
            Coroutine.current().pause(k)

    coroutines = [Coroutine(lambda k=k: body(k), "test") for k in range(5)]
    for _ in range(21):
        for each in coroutines:
            each.resume()
    assert all(each.ended and each.error is None for each in coroutines)
    assert order == list(range(5)) * 20


def test_errors_go_in_and_out():
    def body():
        with pytest.raises(KeyError):
            Coroutine.current().pause(None)
        raise ValueError("mine")

    coroutine = Coroutine(body, "test")
    coroutine.resume()
    coroutine.resume(error=KeyError())
    assert coroutine.ended and isinstance(coroutine.error, ValueError)


def test_a_coroutine_is_stopped_where_it_waits_and_handlers_of_exceptions_do_not_keep_it():
    cleaned = []

    def body():
        try:
            Coroutine.current().pause(None)
        except Exception:
            cleaned.append("taken for a failure")
        finally:
            cleaned.append("cleaned up")

    coroutine = Coroutine(body, "test")
    coroutine.resume()
    coroutine.resume(error=Stop())
    assert coroutine.ended and isinstance(coroutine.error, Stop) and cleaned == ["cleaned up"]


def test_one_that_is_stopped_before_it_began_never_runs():
    ran = []
    coroutine = Coroutine(lambda: ran.append(1), "test")
    coroutine.resume(error=Stop())
    assert coroutine.ended and not ran


def test_threads_outside_are_in_none_and_none_is_left():
    assert Coroutine.current() is None
    before = threading.active_count()
    coroutine = Coroutine(lambda: Coroutine.current(), "test")
    coroutine.resume()
    assert coroutine.result is coroutine and threading.active_count() == before
