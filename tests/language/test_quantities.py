import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideplan.quantities import GIB, format_bytes, format_ns, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("24g", 24 * GIB), ("80 GB", 80 * 10**9), ("512m", 512 << 20),
        ("1.5TiB", 1536 * GIB), ("2tb", 2 * 10**12), (" 1500000 ", 1_500_000), ("7 B", 7), (".5k", 512), ("3kb", 3000),
    ],
)  # fmt: skip
def test_sizes_as_people_type_them(text: str, count: int):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "24 GiBs", "-3g", "1e9", "24,5g", "five"])
def test_sizes_that_are_not_understood(text: str):
    with pytest.raises(ValueError, match="is not understood; write it like 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (24 * GIB, "24.00 GiB"),
     (-3 * GIB, "-3.00 GiB"), (1500 * GIB, "1,500.00 GiB")],
)  # fmt: skip
def test_format_bytes(count: int, text: str):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [(0, "0 ns"), (9999, "9999 ns"), (-20_000, "-20.0 us"), (15_000_000, "15.0 ms"), (12_340_000_000, "12.34 s")],
)
def test_format_ns(duration_ns: int, text: str):
    assert format_ns(duration_ns) == text


@given(st.integers(0, 1 << 50))
def test_what_is_printed_can_be_typed(count: int):
    assert parse_bytes(format_bytes(count).replace(",", "")) == pytest.approx(count, rel=0.06, abs=0.5)
