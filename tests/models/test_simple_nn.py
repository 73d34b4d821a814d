import pytest
import torch

from smolcluster.errors import ConfigError
from smolcluster.models.simple_nn import SimpleNN


def test_default_sizes_are_those_of_mnist() -> None:
    model = SimpleNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_forward_is_linear_relu_linear_on_flattened_images() -> None:
    model = SimpleNN(input_dim=6, hidden=5, out=3).double()
    images = torch.randn(4, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = (images.reshape(4, 6) @ model.hidden.weight.T + model.hidden.bias).clamp(min=0)
    expected = hidden @ model.out.weight.T + model.out.bias
    assert (hidden == 0).any()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-15)  # the same sums in float64


def test_a_batch_without_samples_gives_no_logits_and_zero_gradients() -> None:
    model = SimpleNN(input_dim=6, hidden=5, out=3)
    logits = model(torch.zeros(0, 1, 2, 3))
    assert logits.shape == (0, 3)
    logits.sum().backward()
    assert torch.equal(model.hidden.weight.grad, torch.zeros(5, 6))


def test_initial_values_have_the_distribution_of_torch_linear() -> None:
    model = SimpleNN(input_dim=400, hidden=100, out=50, seed=1)
    for layer in (model.hidden, model.out):
        bound = layer.in_features**-0.5
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.9 * bound
        # uniform: std = bound / sqrt(3); 3 % is more than 5 deviations of 5000 draws
        assert abs(layer.weight.std() * 3**0.5 / bound - 1) < 0.03


def test_a_sample_of_another_size_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"\(1, 8, 8\) has 64 values.*Set model.input_dim=64"):
        SimpleNN()(torch.zeros(2, 1, 8, 8))
