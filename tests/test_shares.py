"""What each of several processes gets, and how their figures are put together again: arithmetic."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fakes import FakeClock
from quiver import config
from quiver.accounts import Rate
from quiver.config import Config, divided, divisions, portions
from quiver.config.shares import DIVIDED
from quiver.errors import ConfigError
from quiver.limits import Buckets, part_of
from quiver.patience import MAX_FAILURES, MOST_SECONDS, STABLE_SECONDS, Patience
from quiver.siblings import Siblings, bury
from quiver.telemetry import whole

COUNTS = st.integers(1, 9)
AMOUNTS = st.integers(0, 1000)
SECTIONS = {name: config.FIELDS[name].section for name in DIVIDED}


def amounts(whole_server):
    """Return what is divided, by name."""
    return {name: getattr(getattr(whole_server, section), name) for name, section in SECTIONS.items()}


def configured(values):
    """Return settings with these amounts."""
    sections = {}
    for name, value in values.items():
        sections.setdefault(SECTIONS[name], {})[name] = value
    return Config(**{s: dataclasses.replace(getattr(Config(), s), **given) for s, given in sections.items()})


# Settings


@given(AMOUNTS, COUNTS)
def test_portions_add_up(amount, count):
    """They are as equal as whole numbers can be."""
    parts = portions(amount, count)
    assert (len(parts), sum(parts)) == (count, amount)
    assert max(parts) - min(parts) <= 1


@given(st.fixed_dictionaries(dict.fromkeys(DIVIDED, AMOUNTS)), COUNTS)
def test_the_parts_of_the_settings_add_up_to_the_whole(values, count):
    """Of each amount all processes together have what the server has; 0 stays 0 for all, and nobody else gets 0."""
    whole_server = configured(values)
    parts = [amounts(divided(whole_server, count, number)) for number in range(count)]
    for name, value in values.items():
        shares = [part[name] for part in parts]
        if name == "max_inflight_bytes":  # a body must fit: see below
            continue
        assert sum(shares) == (max(value, count) if value else 0)
        assert all(shares) == bool(value)


@given(st.fixed_dictionaries(dict.fromkeys(DIVIDED, AMOUNTS)), COUNTS)
def test_nothing_else_is_divided(values, count):
    """A process has all other settings of the server, and knows how many there are."""
    whole_server = configured(values)
    part = divided(whole_server, count, 0)
    assert part.server.processes == count
    for name, field in config.FIELDS.items():
        if name not in (*DIVIDED, "processes"):
            assert getattr(getattr(part, field.section), name) == getattr(getattr(whole_server, field.section), name)


def test_the_largest_body_fits_into_each_part():
    """What one process may hold of bodies is never less than one request may bring."""
    large = Config(server=dataclasses.replace(Config().server, max_inflight_bytes=100, max_body_bytes=60))
    assert [divided(large, 2, number).server.max_inflight_bytes for number in (0, 1)] == [60, 60]
    small = Config(server=dataclasses.replace(Config().server, max_inflight_bytes=50, max_body_bytes=60))
    assert divided(small, 2, 0).server.max_inflight_bytes == 50


def test_memory_is_divided_where_nobody_set_it():
    """What the machine gives to one process is for all of them; what is set comes before it."""
    assert divided(Config(), 4, 1, memory_bytes=1000).server.max_memory_bytes == 250
    given_bytes = Config(server=dataclasses.replace(Config().server, max_memory_bytes=600))
    assert divided(given_bytes, 4, 1, memory_bytes=1000).server.max_memory_bytes == 150


def test_what_is_divided_is_said():
    """Each amount with its parts, and nothing of what is not bounded."""
    said = divisions(configured({"max_concurrent_requests": 100, "cache_bytes": 10, "lanes": 0}), 3)
    assert (said["max_concurrent_requests"], said["cache_bytes"]) == ("100 = 34 + 33 + 33", "10 = 4 + 3 + 3")
    assert "lanes" not in said


@given(st.integers(1, 8), st.integers(8, 60), COUNTS, st.lists(st.sampled_from([0.0, 0.1, 1.0, 5.0]), max_size=80))
def test_all_parts_of_a_rate_let_through_no_more_than_the_rate(per_second, burst, count, pauses):
    """Whatever comes when, and to whichever process, of a burst that is large enough to be divided."""
    clock, rate = FakeClock(), Rate(per_second, max(burst, count))
    processes = [Buckets(clock) for _ in range(count)]
    start, let_through = clock(), 0
    for pause in pauses:
        clock.pass_by(pause)
        let_through += sum(buckets.take("me", part_of(rate, count)).allowed for buckets in processes)
    assert let_through <= rate.burst + per_second * (clock() - start) + 1e-6


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_processes_that_is_none_is_refused(value):
    """It must be 1 or more, and the message names the setting."""
    with pytest.raises(ConfigError, match="processes"):
        config.load(env={}, flags={"processes": value})


# Patience


def test_who_ends_again_and_again_is_started_later_and_later():
    """At once the first time, then after half a second and twice as long each time, up to a bound."""
    patience = Patience()
    waits = [patience.after_end(0.0) for _ in range(12)]
    assert waits[:5] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert max(waits) == MOST_SECONDS


def test_five_ends_in_a_row_are_enough():
    """Not four, and not five of which one came after the process had served for a while."""
    patience = Patience()
    ends = []
    for _ in range(MAX_FAILURES):
        patience.after_end(0.0)
        ends.append(patience.is_at_its_end)
    assert ends == [False] * (MAX_FAILURES - 1) + [True]
    assert patience.after_end(STABLE_SECONDS) == 0.0
    assert not patience.is_at_its_end


# Figures


def registry(*, requests=0, waiting=0.0, invariant=1.0, seconds=()):
    """Return the metrics of a process that has counted."""
    made = CollectorRegistry()
    Counter("quiver_requests", "Requests.", ("route",), registry=made).labels("/a").inc(requests)
    Gauge("quiver_waiting_tokens", "Waiting.", registry=made).set(waiting)
    Gauge("quiver_batch_invariant", "Invariant.", registry=made).set(invariant)
    histogram = Histogram("quiver_seconds", "Time.", ("route",), buckets=(0.1, 1.0), registry=made)
    for one in seconds:
        histogram.labels("/b" if one > 1 else "/a").observe(one)
    return made


def snapshot(**counted):
    """Return what such a process tells."""
    return whole.snapshot_of(registry(**counted).collect())


def numbers(text):
    """Return each line of an exposition but the times at which counting began."""
    families = text_string_to_metric_families(text.decode())
    lines = (sample for family in families for sample in family.samples)
    return {(s.name, *sorted(s.labels.items())): s.value for s in lines if not s.name.endswith("_created")}


def test_a_process_that_is_alone_shows_what_it_counts():
    """Told, read again and written, its figures are byte for byte what prometheus writes of them."""
    made = registry(requests=3, waiting=7, seconds=(0.05, 0.5, 5.0))
    told = whole.decoded(whole.encoded(whole.snapshot_of(made.collect())))
    assert whole.exposition(whole.together([told])) == generate_latest(made)


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0625, 0.5, 5.0]), max_size=5), min_size=1, max_size=4))
def test_counters_and_histograms_add_up(processes):
    """Several processes show what one would that had done all their work."""
    one = registry(requests=sum(map(len, processes)), seconds=[s for seconds in processes for s in seconds])
    many = whole.together([snapshot(requests=len(seconds), seconds=seconds) for seconds in processes])
    expected = numbers(generate_latest(one))
    assert {name: n for name, n in numbers(whole.exposition(many)).items() if "invariant" not in name[0]} == {
        name: n for name, n in expected.items() if "invariant" not in name[0]
    }


def test_gauges_are_put_together_by_what_they_mean():
    """What waits adds up; vectors are invariant only if they are in every process."""
    many = whole.together([snapshot(waiting=3), snapshot(waiting=4, invariant=0.0)])
    found = numbers(whole.exposition(many))
    assert (found["quiver_waiting_tokens",], found["quiver_batch_invariant",]) == (7.0, 0.0)


def test_of_a_process_that_has_ended_only_its_counts_remain():
    """Its requests were answered for ever, and nothing waits in it any more."""
    found = numbers(whole.exposition(whole.together([snapshot(requests=1)], [snapshot(requests=2, waiting=9)])))
    assert (found["quiver_requests_total", ("route", "/a")], found["quiver_waiting_tokens",]) == (3.0, 0.0)


async def test_no_sum_ever_falls(tmp_path):
    """Whoever is asked shows the sums of all, and a process that is killed takes nothing away of what was shown."""
    counted = {"0-1": 5, "1-2": 7}

    def requests(text):
        return numbers(text)["quiver_requests_total", ("route", "/a")]

    def sibling(name):
        return Siblings(tmp_path, name, 2, lambda: snapshot(requests=counted[name]))

    async with sibling("0-1") as first:
        killed = sibling("1-2")
        await killed.__aenter__()
        killed.say_ready()
        assert first.num_ready == 1
        assert requests(await first.exposition()) == requests(await killed.exposition()) == 12
        counted["1-2"] = 100  # counted, and shown to nobody
        killed._server.close()
        assert requests(await first.exposition()) == 12
        bury(tmp_path, "1-2")
        assert first.num_ready == 0
        assert requests(await first.exposition()) == 12
        counted["1-3"] = 1
        async with sibling("1-3") as replacement:
            assert requests(await replacement.exposition()) == 13
        bury(tmp_path, "1-3")
        assert requests(await first.exposition()) == 13
    assert not list(tmp_path.glob("*.sock"))
    assert {path.name for path in tmp_path.iterdir()} == {"gone", "0-1.last"}


async def test_a_process_that_does_not_answer_is_taken_for_what_it_told_last(tmp_path):
    """Its counts stay, and nobody waits for it for long."""
    counted = {"0-1": 5, "1-2": 7}
    async with (
        Siblings(tmp_path, "0-1", 2, lambda: snapshot(requests=counted["0-1"])) as first,
        Siblings(tmp_path, "1-2", 2, lambda: snapshot(requests=counted["1-2"])),
    ):
        before = numbers(await first.exposition())
        (tmp_path / "1-2.sock").unlink()
        (tmp_path / "1-2.sock").touch()  # nobody listens there
        assert numbers(await first.exposition())["quiver_requests_total", ("route", "/a")] == 12
        assert before["quiver_processes", ("state", "wanted")] == 2
