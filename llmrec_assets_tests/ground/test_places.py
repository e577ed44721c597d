"""ZIP codes to places: known ones are found, and nothing is guessed."""

from __future__ import annotations

import time

from llmrec_assets.ground.places import city_state


def test_known_codes() -> None:
    found = city_state(["02139", "94043", "02139-4307", "021394307", " 94043"])
    assert found == {
        "02139": ("Cambridge", "MA"),
        "94043": ("Mountain View", "CA"),
        "02139-4307": ("Cambridge", "MA"),
        "021394307": ("Cambridge", "MA"),
        " 94043": ("Mountain View", "CA"),
    }


def test_foreign_malformed_and_unknown_codes_have_no_place() -> None:
    codes = ["V5K0A1", "E2E3R", "2139", "", "00000", "940433", "94043-", "٩٤٠٤٣", "94043' OR 1=1"]
    assert city_state(codes) == dict.fromkeys(codes)


def test_no_codes() -> None:
    assert city_state([]) == {}


def test_many_codes_at_once_are_quick() -> None:
    codes = [f"{number:05}" for number in range(0, 100_000, 11)]
    start = time.perf_counter()
    found = city_state(codes)
    assert time.perf_counter() - start < 2
    assert len(found) == len(codes)
    assert sum(place is not None for place in found.values()) > 3000
