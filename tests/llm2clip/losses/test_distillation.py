"""The terms of distillation, against their formulas; test_losses_distributed.py has several processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip.losses.distillation import cosine_distance, instance_distance, similarity_distance, structure_distance


@pytest.mark.parametrize("term", [similarity_distance, structure_distance, instance_distance, cosine_distance])
def test_gradients_are_those_of_the_formulas(term: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4, 3, generator=generator).double().requires_grad_()
    teacher = F.normalize(torch.randn(4, 3, generator=generator).double(), dim=1)
    torch.autograd.gradcheck(lambda rows: term(F.normalize(rows, dim=1), teacher), student)


def test_the_terms_are_their_formulas() -> None:
    """Those of ProCLIP times what the docs say: its code adds up squares of rows, and smooth L1 over pairs i < j."""
    generator = torch.Generator().manual_seed(0)
    rows = 7
    student, teacher = (F.normalize(torch.randn(rows, 5, generator=generator).double(), dim=1) for _ in range(2))
    cosines = sum(float(one @ other) for one, other in zip(student, teacher, strict=True))
    assert float(cosine_distance(student, teacher)) == pytest.approx(1 - cosines / rows)
    instances = sum(float((one - other).norm() ** 2) for one, other in zip(student, teacher, strict=True))
    structure = squares = 0.0
    for i in range(rows):
        for j in range(i + 1, rows):
            difference = abs(float((student[i] - student[j]).norm() - (teacher[i] - teacher[j]).norm()))
            structure += 0.5 * difference**2 if difference < 1 else difference - 0.5
            squares += float(student[i] @ student[j] - teacher[i] @ teacher[j]) ** 2
    assert float(similarity_distance(student, teacher)) == pytest.approx(squares / (rows * (rows - 1) / 2))
    assert float(instance_distance(student, teacher)) == pytest.approx(instances / rows)
    assert float(structure_distance(student, teacher)) == pytest.approx(structure / (rows * (rows - 1) / 2))
    means = instance_distance(student, teacher) + (rows - 1) / 2 * structure_distance(student, teacher)
    assert rows * float(means) == pytest.approx(instances + structure)


@pytest.mark.parametrize("term", [structure_distance, similarity_distance])
def test_tiles_change_nothing_and_teachers_may_have_another_width(term: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(9, 5, generator=generator).double().requires_grad_()
    teacher = F.normalize(torch.randn(9, 3, generator=generator).double(), dim=1)
    found = []
    for tile_size in (256, 4, 1):
        loss = term(F.normalize(student, dim=1), teacher, tile_size)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(grad, found[0][1])


def test_equal_rows_have_finite_gradients() -> None:
    """Captions that images share, and a student that is its teacher."""
    rows = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    student = rows[[0, 0, 1, 2]].requires_grad_()
    for teacher in (rows[[0, 1, 1, 2]], student.detach()):
        (grad,) = torch.autograd.grad(structure_distance(student, teacher), student)
        assert grad.isfinite().all()
