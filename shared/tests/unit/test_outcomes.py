"""Outcome maps, which survive loss, repetition and disorder."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scanfleet.scanning.outcomes import (
    MAX_ADDRESSES,
    Outcome,
    OutcomeMap,
    address_at,
    counts,
    index_of,
    merge,
    networks,
)

LETTERS = "".join(Outcome)
SIZE = 12
MAP = st.text(LETTERS, min_size=SIZE, max_size=SIZE)
FIRST = st.sampled_from(["0.0.0.0", "10.0.0.250", "127.9.8.1", "::", "::1", "2001:db8::fffe"])


@given(MAP, MAP)
def test_merge_keeps_set_outcomes(known: str, news: str) -> None:
    """Merging fills blanks and changes nothing else."""
    assert merge(known, news) == "".join(old if old != "." else new for old, new in zip(known, news, strict=True))


@given(MAP, MAP)
def test_merging_again_changes_nothing(known: str, news: str) -> None:
    """A duplicate message, or an older one that arrives later, has no effect."""
    merged = merge(known, news)
    assert merge(merged, news) == merged
    assert merge(merged, known) == merged


@given(MAP, MAP, MAP)
def test_merging_is_associative(one: str, two: str, three: str) -> None:
    """Maps may be folded in any grouping."""
    assert merge(merge(one, two), three) == merge(one, merge(two, three))


@given(MAP, st.lists(st.sets(st.integers(0, SIZE - 1)), min_size=3, max_size=3))
def test_maps_of_one_scan_merge_in_any_order(full: str, seen: list[set[int]]) -> None:
    """Maps that agree where both have a letter, as one attempt's do, give the same in every order."""
    parts = ["".join(full[i] if i in known else "." for i in range(SIZE)) for known in seen]
    assert len({merge(merge(a, b), c) for a, b, c in permutations(parts)}) == 1


@given(MAP, MAP)
def test_which_addresses_are_done_does_not_depend_on_order(one: str, two: str) -> None:
    """Two attempts may disagree about a letter, never about what is left to scan."""
    blanks = [index for index, letter in enumerate(merge(one, two)) if letter == "."]
    assert blanks == [index for index, letter in enumerate(merge(two, one)) if letter == "."]


@pytest.mark.parametrize(("known", "news"), [("..", "..."), ("aa", "aaa"), ("", ".")])
def test_maps_of_different_chunks_do_not_merge(known: str, news: str) -> None:
    """Maps of different lengths are refused, also when nothing is blank."""
    with pytest.raises(ValueError, match="not of the same chunk"):
        merge(known, news)


@given(MAP)
def test_counts_account_for_every_address(outcomes: str) -> None:
    """The counts sum to the addresses."""
    by_outcome = counts(outcomes)
    assert by_outcome.total() == len(outcomes)
    assert all(by_outcome[Outcome(letter)] == outcomes.count(letter) for letter in LETTERS)


@given(FIRST, st.integers(0, MAX_ADDRESSES))
def test_index_of_is_the_inverse_of_address_at(first: str, index: int) -> None:
    """The address at a position is found at that position."""
    assert index_of(first, str(address_at(first, index))) == index


def test_index_of_an_address_before_the_map_is_negative() -> None:
    """An address before the first has a negative position."""
    assert index_of("10.0.0.5", "10.0.0.1") == -4


def test_families_do_not_mix() -> None:
    """An address of the other family has no place."""
    with pytest.raises(ValueError, match="not of the family"):
        index_of("10.0.0.1", "::1")


@given(FIRST, MAP)
def test_networks_cover_exactly_the_blanks(first: str, outcomes: str) -> None:
    """The networks hold each blank address once, in order, and no other address."""
    found = [address for network in networks(first, outcomes) for address in network]
    assert found == [ip_address(first) + index for index, held in enumerate(outcomes) if held == Outcome.BLANK]


def test_networks_are_few() -> None:
    """A whole aligned block is one network, and the last address of all can be in it."""
    assert list(map(str, networks("127.9.8.0", "." * 256))) == ["127.9.8.0/24"]
    assert list(map(str, networks("255.255.255.254", ".."))) == ["255.255.255.254/31"]
    assert list(map(str, networks("127.9.8.0", "a..s...."))) == ["127.9.8.1/32", "127.9.8.2/32", "127.9.8.4/30"]


@pytest.mark.parametrize("text", ["", "b", "a b", "a\n", "." * (MAX_ADDRESSES + 1)])
def test_message_with_an_invalid_map_is_refused(text: str) -> None:
    """Other letters, an empty map and one above the size of a chunk are invalid."""
    with pytest.raises(ValidationError):
        TypeAdapter(OutcomeMap).validate_python(text)


def test_message_accepts_every_letter_and_the_maximum_length() -> None:
    """A map may contain each letter, and be as long as a chunk may be."""
    assert TypeAdapter(OutcomeMap).validate_python(LETTERS) == LETTERS
    assert TypeAdapter(OutcomeMap).validate_python("." * MAX_ADDRESSES)
