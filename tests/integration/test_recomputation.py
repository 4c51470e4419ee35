"""Recomputation with ZeRO-3, where a weight can be read only in its own module's forward pass."""

from __future__ import annotations

from tests.integration.scanning import scan


def test_two_processes_at_stage_3_compute_the_same_bits_however_much_is_recomputed() -> None:
    figures: dict[tuple[str, int], dict[str, list[float]]] = {}
    for line in scan("recomputation", processes=2):
        figures.setdefault((line["case"], line["rank"]), {})[line["recomputed"]] = line["figures"]
    cases = ("demo fp32", "demo_ft bf16")
    assert set(figures) == {(case, rank) for case in cases for rank in (0, 1)}
    for found in figures.values():
        assert list(found) == ["nothing", "all but attention", "all"]
        assert len(set(found["nothing"])) == len(found["nothing"])  # the steps changed the loss
        assert found["all but attention"] == found["all"] == found["nothing"]
