from __future__ import annotations

from everest_ds.errors import escaped


def test_what_a_terminal_would_act_on_is_escaped_and_text_is_not() -> None:
    assert escaped("blocks.0 Grüße 動画 a\\b 'x'") == "blocks.0 Grüße 動画 a\\b 'x'"
    assert escaped("\x1b[2J\r\n\t\x07\x00\x7f\x9b") == r"\x1b[2J\r\n\t\x07\x00\x7f\x9b"
    assert escaped("a\u202eb\u2028c\u200d") == r"a\u202eb\u2028c\u200d"  # direction, line break, invisible joiner
    assert escaped("\udcff\U000e0001") == r"\udcff\U000e0001"  # invalid UTF-8, an invisible tag
    assert escaped(escaped("\x1b")) == escaped("\x1b")
