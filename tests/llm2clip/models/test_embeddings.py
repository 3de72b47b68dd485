"""Inner products in blocks equal one matrix product."""

from __future__ import annotations

import pytest
import torch

from llm2clip.models.embeddings import CPU_COLUMNS, inner_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_columns", [0, 1, CPU_COLUMNS, 2 * CPU_COLUMNS + 3])
def test_blocks_equal_one_matrix_product_in_the_dtype_of_the_result(num_columns: int, dtype: torch.dtype) -> None:
    rows, columns = torch.randn(5, 7), torch.randn(num_columns, 7).to(dtype)
    wide = torch.full((5, num_columns + 4), torch.nan)
    inner_products(rows, columns, wide[:, :num_columns])
    torch.testing.assert_close(wide[:, :num_columns], rows @ columns.float().T)
    assert wide[:, num_columns:].isnan().all(), "memory beside the result must not change"
