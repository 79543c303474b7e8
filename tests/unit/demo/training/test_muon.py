import pytest
import torch

from rapid_integrations.demo.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int], scale: float) -> None:
    matrix = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.3  # the smallest of a square one has not come up yet after five steps
    assert values.max() < 1.3


def test_orthogonalising_keeps_the_singular_vectors() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalise(matrix) @ right.T
    torch.testing.assert_close(inner, inner.diag().diag(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(24, 24), (12, 36), (36, 12)])
def test_steps_are_those_of_torch_up_to_bfloat16(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    mine, reference = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for step in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved, expected = (ours - start).flatten(), (theirs - start).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
    assert 0.98 < moved.norm() / expected.norm() < 1.02
