"""When a client asks again, when it does not, and for how long."""

import socket
import time

import pytest

from client_servers import babbles, cuts, cuts_short, drips, hangs, says, scripted
from clients_both import BOTH
from fakes import FakeClock
from quiver.client import BadReply, RateLimited, Refused, ServerFailed, TimedOut, Unavailable, Unreachable
from quiver.client.core import Core, Retries, Settings
from quiver.client.steps import Fault, Pause, Request, Response, Send

GOOD = {"data": [{"index": 0, "embedding": "AACAPw=="}], "usage": {"total_tokens": 1}}
FINE = Response(200)
REQUEST = Request("GET", "/")
ONCE = Request("POST", "/", is_repeatable=False)
BUSY = Response(429, {"retry-after": "2"})
AWAY = Fault("refused", is_unsent=True)
CUT = Fault("reset")
LATE = Fault("nothing came", is_late=True)
AT_ONCE = {"retry_after_ms": "10", "retry_after": "1"}


def core(clock=None, chance=0.0, **options):
    """Make a client's core whose time and luck are the test's."""
    settings = Settings(url="http://a", timeout=30, **options)
    return Core(settings, clock=clock or FakeClock(), chance=lambda: chance)


def told(plan, clock, *answers):
    """Run an exchange on a fake clock: return its pauses and its end, a response or an error."""
    answers, pauses = list(answers), []
    try:
        step = next(plan)
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                clock.pass_by(step.seconds)
                step = plan.send(None)
            else:
                assert isinstance(step, Send)
                step = plan.send(answers.pop(0))
    except StopIteration as done:
        return pauses, done.value
    except Exception as error:  # noqa: BLE001  it is what the test looks at
        return pauses, error


def tried(*answers, request=REQUEST, timeout=None, **options):
    """Do one exchange with these answers."""
    clock = FakeClock()
    made = core(clock, **options)
    return told(made.exchange(request, made.deadline(timeout)), clock, *answers)


# The rules, without any server


@pytest.mark.parametrize("answer", [BUSY, Response(503, {"retry-after": "2"}), AWAY, CUT])
def test_what_may_pass_is_tried_again(answer):
    """429, 503, no connection, a connection that was cut: the next answer counts."""
    pauses, end = tried(answer, FINE)
    assert end is FINE
    assert len(pauses) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Response(400), Refused),
        (Response(404), Refused),
        (Response(500), ServerFailed),
        (Response(504), TimedOut),
        (Response(302), BadReply),
        (LATE, TimedOut),
    ],
)
def test_what_would_not_change_is_not_tried_again(answer, kind):
    """Negative control: the first answer is the end, with no pause."""
    pauses, end = tried(answer, FINE)
    assert isinstance(end, kind)
    assert pauses == []


def test_what_was_perhaps_done_is_not_done_twice():
    """A request that makes something is sent again only if it has certainly not arrived, or was refused."""
    assert isinstance(tried(CUT, FINE, request=ONCE)[1], Unreachable)
    assert tried(AWAY, FINE, request=ONCE)[1] is FINE
    assert tried(BUSY, FINE, request=ONCE)[1] is FINE


def test_what_the_server_asks_for_is_kept():
    """Never earlier than it says, by milliseconds where it has them, and up to a quarter later."""
    assert tried(BUSY, FINE, chance=0)[0] == [2.0]
    assert tried(BUSY, FINE, chance=1)[0] == [2.5]
    precise = Response(429, {"retry-after": "2", "retry-after-ms": "1200"})
    assert tried(precise, FINE, chance=0)[0] == [1.2]


def test_without_a_word_pauses_double():
    """A quarter of a second first, then twice as long each time, less up to a half by chance."""
    assert tried(AWAY, AWAY, AWAY, AWAY, FINE, chance=1)[0] == [0.25, 0.5, 1.0, 2.0]
    assert tried(AWAY, AWAY, AWAY, AWAY, FINE, chance=0)[0] == [0.125, 0.25, 0.5, 1.0]
    assert Retries(99).pause(50, None, 1.0) == 8.0


@pytest.mark.parametrize("most", [0, 1, 4])
def test_it_gives_up_after_so_many_times(most):
    """The last error is raised; one more answer would have been good."""
    pauses, end = tried(*[AWAY] * (most + 1), FINE, max_retries=most)
    assert isinstance(end, Unreachable)
    assert len(pauses) == most
    assert tried(*[AWAY] * most, FINE, max_retries=most)[1] is FINE


def test_a_pause_beyond_the_deadline_is_not_made():
    """Who would come back too late is told at once, with what the server said."""
    far = Response(429, {"retry-after": "3600"}, b'{"error": {"message": "used up", "code": "insufficient_quota"}}')
    pauses, end = tried(far, FINE)
    assert pauses == []
    assert isinstance(end, RateLimited)
    assert (end.message, end.code, end.retry_after_seconds) == ("used up", "insufficient_quota", 3600)
    assert tried(BUSY, FINE, timeout=2.0)[0] == []
    assert tried(BUSY, FINE, timeout=2.1)[0] == [2.0]


def test_all_attempts_share_one_deadline():
    """Each is told what is left of the time, and so is the server."""
    clock = FakeClock()
    made = core(clock)
    plan = made.exchange(REQUEST, made.deadline(10))
    first = next(plan)
    clock.pass_by(3)
    assert isinstance(plan.send(BUSY), Pause)
    clock.pass_by(2)
    second = plan.send(None)
    assert (first.seconds, second.seconds) == (10, 5)
    assert (first.headers["x-request-timeout"], second.headers["x-request-timeout"]) == ("10.000", "5.000")


def test_a_time_that_is_over_asks_nobody():
    """Nothing is sent once the deadline has passed."""
    assert isinstance(tried(FINE, timeout=0)[1], TimedOut)
    assert tried(FINE, timeout=1)[1] is FINE


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Fri, 01 Jan 1999 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "x", "retry-after": "1"}, None),
        ({"retry-after": "-1"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after_is_read(headers, seconds):
    """Seconds, milliseconds or a date; what cannot be read is as if it were not there."""
    assert Response(429, headers).retry_after_seconds() == seconds


# Against a server that fails


@pytest.fixture(params=BOTH, ids=["blocking", "asynchronous"])
def opened(request):
    """Return what opens each of the clients."""
    return request.param


FAILURES = {
    "429": says(429, {"error": {"message": "busy", "code": "overloaded"}}, **AT_ONCE),
    "503": says(503, {"error": {"message": "loading", "code": "not_ready"}}, **AT_ONCE),
    "cut": cuts,
    "cut short": cuts_short,
    "no http": babbles,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_that_passes_is_not_seen(opened, name):
    """Twice it fails, then it answers: the caller gets vectors, and each attempt said how long it waits."""
    with scripted(FAILURES[name], FAILURES[name], says(200, GOOD)) as (url, script):
        async with opened(url, timeout=20) as client:
            assert (await client.embed("a")).tolist() == [[1.0]]
            assert client.used.num_requests == 1
    waits = [float(got.headers["x-request-timeout"]) for got in script.seen]
    assert len(waits) == 3
    assert 20 >= waits[0] > waits[1] > waits[2] > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("429", RateLimited),
        ("503", Unavailable),
        ("cut", Unreachable),
        ("cut short", Unreachable),
        ("no http", Unreachable),
    ],
)
async def test_a_failure_that_stays_is_raised(opened, name, kind):
    """Negative control: after the last attempt, the error is the server's, by its own class."""
    with scripted(FAILURES[name]) as (url, script):
        async with opened(url, max_retries=1) as client:
            with pytest.raises(kind):
                await client.embed("a")
    assert len(script.seen) == 2


async def test_a_server_that_is_not_there_is_named(opened):
    """The URL is in the error, and what became of the connection."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with opened(f"http://127.0.0.1:{port}", max_retries=1) as client:
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port} does not answer"):
            await client.embed("a")


@pytest.mark.parametrize("slow", [hangs, drips], ids=["nothing comes", "it drips"])
async def test_a_slow_reply_ends_with_the_deadline(opened, slow):
    """However slow the server: once the time is over, the call is."""
    with scripted(slow) as (url, script):
        async with opened(url) as client:
            start = time.perf_counter()
            with pytest.raises(TimedOut):
                await client.embed("a", timeout=0.5)
            assert 0.4 < time.perf_counter() - start < 3
    assert len(script.seen) == 1


async def test_one_part_that_fails_ends_the_others(opened):
    """Parts that still pause or wait for their turn are given up: nobody waits for them."""
    refused = says(400, {"error": {"message": "no", "code": "invalid_value"}})
    busy = says(429, {}, retry_after="10")
    with scripted(busy, refused, busy) as (url, script):
        async with opened(url, max_inputs=1, max_concurrency=2) as client:
            start = time.perf_counter()
            with pytest.raises(Refused, match="no"):
                await client.embed(list("abcdefgh"))
        assert time.perf_counter() - start < 5
    assert len(script.seen) < 8
