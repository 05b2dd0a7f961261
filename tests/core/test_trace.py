"""traceparent, as the W3C recommendation says it is to be read."""

import pytest

from baton.core.trace import MAX_STATE_CHARS, TraceContext, parse_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_valid_header_is_read_and_written():
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-01", "vendor=1")
    assert context == TraceContext(int(TRACE, 16), int(SPAN, 16), True, "vendor=1")
    assert context.traceparent == f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("fe", False),
                                                  ("ff", True)])  # fmt: skip
def test_only_the_lowest_flag_says_sampled(flags, is_sampled):
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}")
    assert context is not None and context.is_sampled is is_sampled


def test_header_of_a_later_version_may_be_longer():
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01-more") is not None
    assert parse_traceparent(f"01-{TRACE}-{SPAN}-01") is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0g",
        "00-" + "1" * 100_000,
    ],
)
def test_malformed_header_is_no_context(header):
    assert parse_traceparent(header) is None


@pytest.mark.parametrize(
    "state", ["", "vendor=1", "a=1,b=2 , c@d=x y", "t-1@v=1", "rojo=00f067aa0ba902b7,"]
)
def test_valid_state_is_handed_on_as_it_is(state):
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-01", state)
    assert context is not None and context.state == state


@pytest.mark.parametrize(
    "state",
    [
        "a=" + "1" * MAX_STATE_CHARS,
        "novalue",
        "Upper=1",
        "a=1,a=2",
        "a=1=2",
        "a=\n",
        "a=\u00e9",
        ",".join(f"k{i}=1" for i in range(33)),
    ],
)
def test_invalid_state_is_left_out_and_the_context_kept(state):
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-01", state)
    assert context is not None and context.state == ""
