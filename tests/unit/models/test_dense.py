"""Dense layers of many rows, where oneDNN and sums in parts come in: values and gradients against ordinary operations."""

import pytest
import torch
import torch.nn.functional as F

from limaml.models.dense import by_weight, linear, linear_relu


@pytest.mark.parametrize("num_rows", [8, 511, 512, 4096, 4100])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "block of a larger matrix"])
@pytest.mark.parametrize("layer", [linear, linear_relu])
def test_a_layer_and_its_gradients_equal_ordinary_operations(num_rows, cut, layer):
    generator = torch.Generator().manual_seed(num_rows)
    x, large, bias = (torch.randn(shape, generator=generator) for shape in ((num_rows, 60), (33, 92), (33,)))
    given = [t.clone().requires_grad_() for t in (x, large[:, :60].clone() if not cut else large, bias)]
    weight = given[1][:, :60] if cut else given[1]
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted = F.linear(exact[0], exact[1][:, :60], exact[2])
    wanted = wanted.relu() if layer is linear_relu else wanted
    out = layer(given[0], weight, given[2])
    direction = torch.randn(out.shape, generator=generator)
    # float32 sums of 60 to 4,100 products of size 1.
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(out, given, direction)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, exact, direction.double()), strict=True):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("outputs", "inputs"), [(3, 7), (7, 3), (1, 5)])
@pytest.mark.parametrize("num_rows", [6, 4096, 4097])
def test_a_weights_gradient_is_the_sum_over_rows_however_it_is_divided(num_rows, outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(num_rows, width, generator=generator, dtype=torch.float64) for width in (outputs, inputs))
    torch.testing.assert_close(by_weight(grad, x), torch.einsum("no,ni->oi", grad, x), rtol=1e-11, atol=1e-11)
