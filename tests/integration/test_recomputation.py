"""Recomputation under ZeRO-3, where a weight can be read in its own module's forward pass alone."""

from __future__ import annotations

import json

from tests.integration.launch import compute


def test_two_processes_at_stage_3_compute_the_same_bits_however_much_is_recomputed() -> None:
    done = compute([], processes=2, module="tests.integration.scan_recomputation")
    assert done.returncode == 0, done.stderr
    seen = [json.loads(text.splitlines()[0]) for text in done.stdout.split("SEEN ")[1:]]
    figures: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in seen:
        figures.setdefault((line["case"], line["rank"]), {})[line["recomputed"]] = line["figures"]
    cases = ("demo fp32", "demo_ft bf16")
    assert set(figures) == {(case, rank) for case in cases for rank in (0, 1)}
    for found in figures.values():
        assert list(found) == ["nothing", "all but attention", "all"]
        assert len(set(found["nothing"])) == len(found["nothing"])  # the steps did something
        assert found["all but attention"] == found["all"] == found["nothing"]
