"""What people write on the command line, and how it is drawn there."""

import math
from datetime import UTC, datetime

import pytest

from quiver import cli_values
from quiver.accounts import FIRST_TIERS, Rate, Tier
from quiver.errors import InvalidInput

NOW = 1_782_950_400.0  # 2026-07-02


@pytest.mark.parametrize(
    ("used", "quota", "bar"),
    [(0, 10, ".......... 0%"), (9, 10, "#########. 90%"), (25, 10, "########## 250%"), (0, 0, "########## 100%")],
)
def test_a_bar_is_as_long_as_the_part(used, quota, bar):
    """It never leaves its room, and a quota of nothing is used up."""
    assert cli_values.part_of(used, quota) == f"{bar} of {quota}"


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("30m", 1800), ("24h", 86_400), ("90d", 7_776_000), ("2w", 1_209_600)]
)
def test_a_duration_is_a_number_and_a_unit(text, seconds):
    """Seconds, minutes, hours, days and weeks have a letter each."""
    assert cli_values.seconds_of(text) == seconds
    assert cli_values.end_of(text, NOW) == NOW + seconds


def test_a_day_is_good_to_its_end():
    """A key that expires on a day is good on it, in UTC."""
    assert cli_values.end_of("2027-01-31", NOW) == datetime(2027, 2, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    "text", ["", "90", "d", "-1d", "1.5h", "3y", "0s", "99999999d", "2026-07-01", "2027-02-30", "9999-12-31", "٣d"]
)
def test_what_is_no_end_is_refused(text):
    """Neither a duration nor a day that is to come, or one that nobody lives to see."""
    with pytest.raises(InvalidInput, match=r"is no duration|is no day|is over already"):
        cli_values.end_of(text, NOW)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"monthly": "7"}, Tier("t", 7, Rate(1, 2))),
        ({"monthly": "none"}, Tier("t", None, Rate(1, 2))),
        ({"rate": "0.5"}, Tier("t", 5, Rate(0.5, 2))),
        ({"burst": "9"}, Tier("t", 5, Rate(1, 9))),
        ({"rate": "none"}, Tier("t", 5)),
        ({"rate": "none", "burst": "none", "monthly": "0"}, Tier("t", 0)),
    ],
)
def test_a_bound_is_a_number_or_none(given, wanted):
    """What is given changes, and `none` takes a bound away."""
    assert cli_values.changed(Tier("t", 5, Rate(1, 2)), **given) == wanted


@pytest.mark.parametrize(
    "given",
    [
        {"monthly": "many"},
        {"monthly": "-1"},
        {"monthly": "1.5"},
        {"monthly": "1e16"},
        {"rate": "0"},
        {"rate": "nan"},
        {"rate": str(math.inf)},
        {"burst": "0.5"},
        {"burst": "none"},
        {"rate": "none", "burst": "3"},
    ],
)
def test_what_is_no_bound_is_refused(given):
    """A number that bounds nothing, or half a rate."""
    with pytest.raises(InvalidInput):
        cli_values.changed(FIRST_TIERS[0], **given)
