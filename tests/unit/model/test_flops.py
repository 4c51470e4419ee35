"""Fine-tuning rows of the paper's Tables 5 and 11, parameters of Table 15, and the cost of candidate frames.

What each row counts is in tests/integration/test_commands.py.
"""

from __future__ import annotations

import pytest

from everest_ds.benchmark.flops import PAPER_ROWS, PaperRow, count_row, num_parameters

# As printed, (all tokens, EVEREST), in three digits. Measured worst: 29.0711 for 29.1, -0.0993 %.
PRINTED = {
    ("5", "base"): (180.5, 98.1),
    ("11", "small"): (57.0, 29.1),
    ("11", "base"): (180.5, 98.1),
    ("11", "large"): (597.2, 330.0),
}
RTOL = 1e-3


def test_rows_of_tables_5_and_11_are_counted_within_a_thousandth() -> None:
    rows = [row for row in PAPER_ROWS if row.table in ("5", "11")]
    assert {(row.table, row.size) for row in rows} == PRINTED.keys()
    assert len(rows) == 2 * len(PRINTED)
    for row in rows:
        full, everest = PRINTED[row.table, row.size]
        assert row.gmacs == (full if row.ratio is None else everest)
        assert count_row(row).paper / 1e9 == pytest.approx(row.gmacs, rel=RTOL), row.name


# As printed, in millions, three or four digits: (pre-training, fine-tuning) by embedding layers. Measured worst:
# 102.543 for 102.5, +0.042 %. With the 400 classes of K400, fine-tuning would be 0.28 % off.
PRINTED_PARAMETERS = {1: (94.2, 86.3), 2: (102.5, 94.6), 3: (97.8, 89.9)}
EMBEDDING_KERNELS = {1: [(3, 512)], 2: [(3, 32), (768, 16)], 3: [(3, 32), (768, 4), (768, 4)]}


def parameters_by_hand(layers: int, phase: str) -> int:
    """Return ViT-B's parameters: biases of query and value but not key, LayerNorms of two vectors, no positions."""

    def block(width: int) -> int:
        return (
            (3 * width * width + 2 * width) + (width * width + width) + (8 * width * width + 5 * width) + 4 * width
        )

    embedding = sum(channels * pixels * 768 + 768 for channels, pixels in EMBEDDING_KERNELS[layers])
    encoder = embedding + 12 * block(768) + 2 * 768
    if phase == "finetune":
        return encoder + 768 * 51 + 51
    decoder = 4 * block(384) + 2 * 384 + 384 * 1536 + 1536
    return encoder + 768 * 384 + 384 + decoder


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_parameters_of_table_15_are_counted_within_a_thousandth(layers: int, phase: str) -> None:
    (row,) = [r for r in PAPER_ROWS if (r.table, r.embedding_layers, r.phase) == ("15", layers, phase)]
    assert row.parameters == PRINTED_PARAMETERS[layers][phase == "finetune"]
    assert num_parameters(row) == parameters_by_hand(layers, phase)
    assert num_parameters(row) / 1e6 == pytest.approx(row.parameters, rel=RTOL)
    assert round(num_parameters(row) / 1e6, 1) == row.parameters


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_candidate_frames_cost_their_embedding_and_nothing_else(ratio: float) -> None:
    (row,) = [r for r in PAPER_ROWS if (r.alpha, r.ratio) == (1.5, ratio)]
    chosen, plain = count_row(row), count_row(PaperRow(table="", name="", gmacs=None, ratio=ratio))
    more = (12 - 8) * 14 * 14 * (3 * 2 * 16 * 16) * 768
    assert chosen.executed - plain.executed == more
    assert chosen.paper - plain.paper == more
