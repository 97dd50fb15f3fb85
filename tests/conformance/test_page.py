"""docs/conformance.md says what the tests show."""

from __future__ import annotations

from collections import Counter

from tests.conformance.duties import PAGE, read_cases, read_duties, render

DUTIES = read_duties()
CASES = read_cases()


def test_every_must_and_should_has_a_test() -> None:
    shown = {number for case in CASES for number in case.numbers}
    assert [duty.number for duty in DUTIES if duty.number not in shown] == []


def test_every_number_in_a_test_is_a_duty() -> None:
    """A slip of the pen would leave the duty that was meant without its test."""
    known = {duty.number for duty in DUTIES}
    assert [case for case in CASES if not known.issuperset(case.numbers)] == []


def test_numbers_are_given_once() -> None:
    assert [number for number, count in Counter(duty.number for duty in DUTIES).items() if count > 1] == []


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(DUTIES, CASES), "run tools/gen_conformance.py"
