import torch

from golden_weights import uniform


def test_uniform_matches_the_published_values() -> None:
    torch.testing.assert_close(
        uniform("a", (4,), 0), torch.tensor([-0.4842, 0.5882, 0.5091, -0.5617]), atol=5e-5, rtol=0
    )
    torch.testing.assert_close(
        uniform("a", (4,), 1), torch.tensor([-0.8085, -0.4546, -0.7025, -0.3909]), atol=5e-5, rtol=0
    )
