"""The loss of a distillation, against its formula; test_losses_distributed.py has several processes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm2clip.losses.distillation import cosine_distance


def test_the_loss_is_its_formula_and_so_are_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 5, generator=generator).double().requires_grad_()
    teacher = F.normalize(torch.randn(7, 5, generator=generator).double(), dim=1)
    rows = F.normalize(student, dim=1)
    cosines = sum((one @ other).item() for one, other in zip(rows, teacher, strict=True))
    assert cosine_distance(rows, teacher).item() == pytest.approx(1 - cosines / 7)
    torch.autograd.gradcheck(lambda given: cosine_distance(F.normalize(given, dim=1), teacher), student)
