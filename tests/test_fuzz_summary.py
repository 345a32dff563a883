"""The summary of `make fuzz` counts what hypothesis tells of."""

from __future__ import annotations

import pytest

import fuzz
from fuzz import FILES, ROOT, add

STATISTICS = """
tests/test_a.py::test_one:

  - during reuse phase (0.01 seconds):
    - {reused}
  - during generate phase (53.84 seconds):
    - Typical runtimes: ~ 1-85 ms, of which ~ 0-59 ms in data generation
    - {generated}
  - Stopped because settings.max_examples=1200

tests/test_a.py::test_two:

  - during generate phase (1 seconds):
    - {generated}
"""


@pytest.mark.parametrize(
    "words",
    ["{} passing, {} failing, and {} invalid test cases", "{} passing examples, {} failing examples, {} invalid examples"],
)
def test_examples_are_summed_by_test(words: str) -> None:
    output = STATISTICS.format(reused=words.format(1, 2, 3), generated=words.format(1200, 0, 147))
    tests: dict[str, dict[str, int]] = {}
    for _ in range(2):
        add(tests, output)
    assert tests == {
        "tests/test_a.py::test_one": {"passing": 2402, "failing": 4, "invalid": 300},
        "tests/test_a.py::test_two": {"passing": 2400, "failing": 0, "invalid": 294},
    }


def test_failures_are_found() -> None:
    assert fuzz.FAILED.findall("FAILED tests/a.py::b - no\nERROR tests/c.py\npassed\n") == ["tests/a.py::b - no", "tests/c.py"]


def test_files_that_are_fuzzed_are_there() -> None:
    assert all((ROOT / file).is_file() for file in FILES)
