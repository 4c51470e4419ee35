"""Fast parsing of plain lines of a list, thousands at a time: numpy finds path, label and window in the bytes.

Place in the flow: lines as bytes -> `scan_block` -> LineBlock. A line is plain if `list_line.parse_line` is certain
to return the same: a path, with or without double quotes, one separator, a label, and perhaps a window, all in
digits. The other lines are left to `parse_line`.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PLAIN, _SEPARATOR, _LINE_END, _QUOTE, _ODD = range(5)
_DOT, _SLASH, _MINUS, _ZERO, _DOUBLE_QUOTE = b'./-0"'
# Control characters, and the field separators of other formats.
_ODD_BYTES = bytes({*range(32), 127, *b";|"} - {*b"\t\n"})
_KINDS = np.full(256, _PLAIN, np.uint8)
for _bytes, _kind in ((b" ,\t", _SEPARATOR), (b"\n", _LINE_END), (b'"', _QUOTE), (_ODD_BYTES, _ODD)):
    _KINDS[list(_bytes)] = _kind
_DIGIT = np.isin(np.arange(256), list(b"0123456789"))
_BEGINS_NUMBER = np.isin(np.arange(256), list(b"+-.0123456789"))
_ENDS_NO_TIME = np.isin(np.arange(256), list(b"nfyNFY"))  # "nan", "inf" and "infinity"
_ENDS_NUMBER = np.isin(np.arange(256), list(b".0123456789"))
# Comments, JSON and empty first fields begin with these.
_ODD_START = np.isin(np.arange(256), list(b"#[{ ,\t"))
# Line ends of str.splitlines besides the newline, and spaces of str.strip outside ASCII.
_OTHER_ENDS = (b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9")
_OTHER_SPACES = re.compile(rb"\xc2\xa0|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xaf]|\xe2\x81\x9f|\xe3\x80\x80")
_MOST_LABEL_DIGITS, _MOST_TIME_DIGITS = 9, 15

_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class LineBlock:
    """The lines of a block.

    Attributes:
        content: Bytes of the block.
        starts: Offset of each line's first byte.
        ends: Offset of each line's newline.
        is_plain: Whether the following fields are valid for a line; other lines may be blank, rows, or faults.
        path_starts: Offset of the path's first byte.
        path_ends: Offset after the path's last byte.
        labels: Class of each line.
        times_s: Start and end of the window, of shape (lines, 2); NaN for the whole video.
    """

    content: bytes
    starts: _Ints
    ends: _Ints
    is_plain: _Bools
    path_starts: _Ints
    path_ends: _Ints
    labels: _Ints
    times_s: NDArray[np.float64]

    def plain_paths(self, chosen: _Bools) -> bytes:
        """Return the concatenated paths of the ``chosen`` lines, which must be plain."""
        steps = np.zeros(len(self.content) + 1, np.int8)
        steps[self.path_starts[chosen]] = 1
        steps[self.path_ends[chosen]] = -1
        return np.frombuffer(self.content, np.uint8)[np.cumsum(steps[:-1], dtype=np.int8).view(bool)].tobytes()


def has_other_line_ends(content: bytes) -> bool:
    """Return whether the content may have line ends other than a newline."""
    return any(end in content for end in _OTHER_ENDS)  # a search for each is ten times as fast as a pattern


def scan_block(content: bytes) -> LineBlock:
    """Find the plain lines of a block.

    Args:
        content: Whole lines, each ending in a newline, without other line ends.
    """
    codes = np.frombuffer(content, np.uint8)
    kinds = _KINDS[codes]
    ends = np.flatnonzero(kinds == _LINE_END)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines = _Lines(codes, kinds, starts, ends)
    if not content.isascii() and _OTHER_SPACES.search(content):
        return lines.block(content, np.zeros(len(ends), bool))
    return lines.block(content, lines.are_simple())


class _Lines:
    """Implementation of `scan_block`. Fields are numbered from the end of a line: number 1 is the last."""

    def __init__(self, codes: NDArray[np.uint8], kinds: NDArray[np.uint8], starts: _Ints, ends: _Ints) -> None:
        self.codes, self.kinds, self.starts, self.ends = codes, kinds, starts, ends
        self.first, self.second, self.third = (codes[np.minimum(starts + n, len(codes) - 1)] for n in range(3))
        self.separators = np.flatnonzero(kinds == _SEPARATOR)
        self.stops = np.searchsorted(self.separators, ends)
        self.counts = self.stops - np.searchsorted(self.separators, starts)

    def are_simple(self) -> _Bools:
        """Return which lines have no odd byte, begin like a path, and have a path spelled as `Path` spells it."""
        codes, kinds = self.codes, self.kinds
        simple = (self.counts > 0) & ~_ODD_START[self.first]
        slashes = np.flatnonzero(codes == _SLASH)
        after, then = codes[slashes + 1], codes[np.minimum(slashes + 2, len(codes) - 1)]
        ends_name = (_KINDS != _PLAIN) | (np.arange(256) == _SLASH)
        odd_slash = ends_name[after] | ((after == _DOT) & ends_name[then])
        for odd in (np.flatnonzero(kinds == _ODD), slashes[odd_slash]):
            simple[np.searchsorted(self.ends, odd)] = False
        only_dot = (self.first == _DOT) & ends_name[self.second] & (self.second != _SLASH)
        quoted_dot = (self.first == _DOUBLE_QUOTE) & (self.second == _DOT) & ends_name[self.third]
        return simple & ~only_dot & ~quoted_dot

    def block(self, content: bytes, simple: _Bools) -> LineBlock:
        """Read labels and windows of simple lines."""
        quoted, closes, counts = self._quotes()
        simple &= quoted | (closes < 0)
        labels, is_label = self._integers(1)
        third, is_third = self._integers(3)
        start_s, is_start = self._times(2)
        end_s, is_end = self._times(1)
        # A quoted path is unambiguous. Otherwise the path's last word must not look like a number, and the path
        # must not begin like a row with an index.
        numbered = _DIGIT[self.first]
        whole = np.where(quoted, counts == 1, (counts == 1) | ~(self._may_be_number(2) | numbered))
        cut = np.where(quoted, counts == 3, (counts == 3) | ~(self._may_be_number(4) | numbered))
        is_whole = simple & is_label & whole & self._has_field(2)
        is_cut = (
            simple & is_third & is_start & is_end & (start_s < end_s) & cut & (counts >= 3) & self._has_field(4)
        )
        is_cut &= ~is_whole
        is_plain = is_whole | is_cut
        path_ends = np.where(quoted, closes, np.where(is_cut, self._separator(3), self._separator(1)))
        path_starts = np.where(quoted, self.starts + 1, self.starts + 2 * self._begins_here())
        times_s = np.where(is_cut[:, None], np.stack([start_s, end_s], axis=1), np.nan)
        is_plain &= path_starts < path_ends
        labels = np.where(is_cut, third, labels)
        return LineBlock(content, self.starts, self.ends, is_plain, path_starts, path_ends, labels, times_s)

    def _quotes(self) -> tuple[_Bools, _Ints, _Ints]:
        """Return which lines begin with a quoted path, the offset of its closing quote, and the separators after.

        The offset is -1 for a line without quotes, and meaningless for a line with quotes elsewhere.
        """
        quotes = np.flatnonzero(self.kinds == _QUOTE)
        if not len(quotes):
            return np.zeros(len(self.ends), bool), np.full(len(self.ends), -1), self.counts
        first, stop = np.searchsorted(quotes, self.starts), np.searchsorted(quotes, self.ends)
        opens = quotes[np.minimum(first, len(quotes) - 1)]
        closes = quotes[np.minimum(first + 1, len(quotes) - 1)]
        quoted = (stop - first == 2) & (opens == self.starts) & (self.kinds[closes + 1] == _SEPARATOR)
        after = self.stops - np.searchsorted(self.separators, closes)
        return quoted, np.where(stop > first, closes, -1), np.where(quoted, after, self.counts)

    def _begins_here(self) -> _Bools:
        """Return which lines begin with ``./``, which `Path` drops."""
        return (self.first == _DOT) & (self.second == _SLASH)

    def _separator(self, number: int) -> _Ints:
        """Return the offset of the separator before a field; one before the line's start if there is none."""
        if not len(self.separators):
            return self.starts - 1
        found = self.separators[np.maximum(self.stops - number, 0)]
        return np.where(self.counts >= number, found, self.starts - 1)

    def _field(self, number: int) -> tuple[_Ints, _Ints]:
        stops = self.ends if number == 1 else self._separator(number - 1)
        return self._separator(number) + 1, np.maximum(stops, self.starts)

    def _has_field(self, number: int) -> _Bools:
        starts, stops = self._field(number)
        return starts < stops

    def _may_be_number(self, number: int) -> _Bools:
        """Return which lines may have a number in a field, or a word such as nan or inf in place of a time."""
        starts, stops = self._field(number)
        last = self.codes[np.maximum(stops - 1, 0)]
        return (_BEGINS_NUMBER[self.codes[starts]] & _ENDS_NUMBER[last]) | _ENDS_NO_TIME[last]

    def _integers(self, number: int) -> tuple[_Ints, _Bools]:
        """Return the integers of up to nine digits in a field, perhaps negative, and which lines have one."""
        starts, stops = self._field(number)
        negative = self.codes[starts] == _MINUS
        starts = starts + negative
        lengths = stops - starts
        valid = (lengths > 0) & (lengths <= _MOST_LABEL_DIGITS)
        values = np.zeros(len(starts), np.int64)
        for place in range(int(lengths[valid].max(initial=0))):
            inside = valid & (place < lengths)
            digits = self.codes[np.where(inside, starts + place, 0)].astype(np.int64) - _ZERO
            valid &= ~inside | ((digits >= 0) & (digits < 10))
            values = np.where(inside, values * 10 + digits, values)
        return np.where(negative, -values, values), valid

    def _times(self, number: int) -> tuple[NDArray[np.float64], _Bools]:
        """Return the decimals of up to 15 digits in a field, as float() reads them, and which lines have one."""
        starts, stops = self._field(number)
        lengths = stops - starts
        valid = (lengths > 0) & (lengths <= _MOST_TIME_DIGITS + 1)
        values, decimals = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
        seen, points = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
        for place in range(int(lengths[valid].max(initial=0))):
            inside = valid & (place < lengths)
            codes = self.codes[np.where(inside, starts + place, 0)]
            is_point, is_digit = inside & (codes == _DOT), inside & _DIGIT[codes]
            valid &= ~inside | is_point | is_digit
            values = np.where(is_digit, values * 10 + codes.astype(np.int64) - _ZERO, values)
            seen += is_digit
            decimals += is_digit & (points > 0)
            points += is_point
        valid &= (points <= 1) & (seen > 0) & (seen <= _MOST_TIME_DIGITS)
        # Both are exact as floats, so their quotient is the float nearest to the decimal number, as in float().
        return values / 10.0 ** np.minimum(decimals, _MOST_TIME_DIGITS), valid
