"""What moves in the inner loop: the parameters of T tasks and the plain gradient steps they take.

`embed` gives the embeddings at the present parameters, `pull` turns their gradient dL_in/de into gradients of the parameters,
`move` takes the step. All of it is ordinary arithmetic on tensors, differentiated once for the outer gradient: no double
backward. A caller who computes the gradients without a graph gets first order.

    T tasks, S rows, M rows of the steps taken so far, I inputs, O outputs, D embedding width
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from limaml.models.dense import gate, linear, linear_relu

Params = dict[str, Tensor]
"""Parameters of T tasks: the task is every tensor's leading dimension."""


class Adapted(Protocol):
    """A meta block's parameters on their way from theta to phi."""

    def embed(self) -> Tensor: ...
    def pull(self, grad_TD: Tensor) -> list[Tensor]: ...
    def move(self, gradients: list[Tensor]) -> None: ...


class AdaptedVector:
    """The embedding itself moves."""

    def __init__(self, vector_TD: Tensor, size_TD: Tensor) -> None:
        self._vector_TD, self.size = vector_TD, size_TD

    def embed(self) -> Tensor:
        return self._vector_TD

    def pull(self, grad_TD: Tensor) -> list[Tensor]:
        return [grad_TD]

    def move(self, gradients: list[Tensor]) -> None:
        self._vector_TD = self._vector_TD - self.size * gradients[0]


class AdaptedMlp:
    """A ReLU network whose weights move, on each task's rows, averaged over the rows before the last layer.

    The last layer is linear, so the mean of its outputs is its output for the mean of its inputs: one row a task.
    """

    def __init__(
        self,
        mlp: Mapping[str, Tensor],
        sizes: Params,
        x_TSI: Tensor,
        *,
        pool_TS1: Tensor | None = None,
        empty_D: Tensor | None = None,
        input_moves: bool = False,
    ) -> None:
        """`pool_TS1` holds the rows' shares in the mean, 0 for padding, none if there is one row a task.

        `empty_D`: the embedding of a task without rows. `input_moves`: the input is a parameter, its step size `sizes["id"]`.
        """
        self._x_TSI, self._pool_TS1, self._empty_D = x_TSI, pool_TS1, empty_D
        self._input_size = sizes["id"].unsqueeze(1) if input_moves else None
        num_layers = len(mlp) // 2
        self._layers: list[GramLayer | BuiltLayer] = [
            _layer(
                mlp,
                sizes,
                number,
                num_rows=1 if number == num_layers - 1 else x_TSI.shape[1],
                constant_TSI=x_TSI if number == 0 and not input_moves else None,
            )
            for number in range(num_layers)
        ]
        self._inputs: list[Tensor] = []
        """Inputs of every layer at the last `embed`; that of the last layer comes after its pooling."""
        self._pooled = x_TSI

    def embed(self) -> Tensor:
        """(T, D)."""
        *hidden, last = self._layers
        # An input that moves carries a graph of its own; one that is read without a graph must not bring it back.
        moves_unseen = self._input_size is not None and not torch.is_grad_enabled()
        inputs = [self._x_TSI.detach() if moves_unseen else self._x_TSI]
        for layer in hidden:
            inputs.append(layer.forward(inputs[-1], relu=True))
        self._pooled = inputs[-1] if self._pool_TS1 is None else (self._pool_TS1 * inputs[-1]).sum(dim=1, keepdim=True)
        self._inputs = inputs
        embedding_TD = last.forward(self._pooled).squeeze(1)
        if self._pool_TS1 is None or self._empty_D is None:
            return embedding_TD
        return torch.where(self._pool_TS1.sum(dim=1) > 0, embedding_TD, self._empty_D)

    def pull(self, grad_TD: Tensor) -> list[Tensor]:
        """Gradients at every layer's output, first layer first, and at the input if that moves."""
        d = grad_TD.unsqueeze(1)
        found = [d]
        for number in range(len(self._layers) - 1, 0, -1):
            d = self._layers[number].pull(d)
            if number == len(self._layers) - 1 and self._pool_TS1 is not None:
                d = d * self._pool_TS1
            d = gate(d, self._inputs[number])
            found.append(d)
        if self._input_size is not None:
            found.append(self._layers[0].pull(d))
        return found[::-1]

    def move(self, gradients: list[Tensor]) -> None:
        if self._input_size is not None:
            by_input, *gradients = gradients
        for layer, x, d in zip(self._layers, [*self._inputs[:-1], self._pooled], gradients, strict=True):
            layer.move(x, d)
        if self._input_size is not None:
            self._x_TSI = self._x_TSI - self._input_size * by_input


class BuiltLayer:
    """A dense layer of which every task's own weights are built. Any step size for any weight."""

    def __init__(self, weight_IO: Tensor, bias_O: Tensor, weight_size: Tensor, bias_size: Tensor) -> None:
        self._shared: tuple[Tensor, Tensor] | None = (weight_IO, bias_O)
        self._weight_TIO = weight_IO.expand(len(weight_size), -1, -1)
        self._bias_TO = bias_O.expand(len(bias_size), -1)
        self._sizes = weight_size, bias_size

    def forward(self, x_TSI: Tensor, *, relu: bool = False) -> Tensor:
        if self._shared is not None:
            weight_IO, bias_O = self._shared
            return (linear_relu if relu else linear)(x_TSI, weight_IO.t(), bias_O)
        out_TSO = torch.baddbmm(self._bias_TO.unsqueeze(1), x_TSI, self._weight_TIO)
        return out_TSO.relu_() if relu else out_TSO

    def pull(self, d_TSO: Tensor) -> Tensor:
        if self._shared is not None:
            return linear(d_TSO, self._shared[0])
        return torch.bmm(d_TSO, self._weight_TIO.transpose(1, 2))

    def move(self, x_TSI: Tensor, d_TSO: Tensor) -> None:
        weight_size, bias_size = self._sizes
        self._weight_TIO = self._weight_TIO - weight_size * torch.bmm(x_TSI.transpose(1, 2), d_TSO)
        self._bias_TO = self._bias_TO - bias_size * d_TSO.sum(dim=1)
        self._shared = None


class GramLayer:
    """A dense layer of which no task's weights are built: x W' = x W - size (x X^T) D after a step at inputs X, gradients D.

    One step size for all weights and one for all biases. Products of S x S take the place of I x O, and no tensor of T weights
    is read or written.
    """

    def __init__(
        self, weight_IO: Tensor, bias_O: Tensor, weight_size_T11: Tensor, bias_size_T1: Tensor, constant_TSI: Tensor | None
    ) -> None:
        """`constant_TSI`: inputs that come again at every step (rows' features), whose products are kept."""
        self._weight_IO, self._bias_O = weight_IO, bias_O
        self._weight_size_T11, self._bias_size_T11 = weight_size_T11, bias_size_T1.unsqueeze(2)
        self._constant_TSI = constant_TSI
        self._kept: dict[tuple[str, bool], Tensor] = {}
        self._moved: tuple[Tensor, Tensor] | None = None
        """Inputs and gradients of the steps taken, side by side as rows; steps at the constant inputs are summed."""

    def forward(self, x_TSI: Tensor, *, relu: bool = False) -> Tensor:
        out_TSO = self._base(x_TSI)
        if self._moved is None:
            return out_TSO.relu() if relu else out_TSO
        inputs_TMI, d_TMO = self._moved
        out_TSO = torch.baddbmm(out_TSO, self._kernel(x_TSI, inputs_TMI), d_TMO, alpha=-1)
        return out_TSO.relu_() if relu else out_TSO

    def pull(self, d_TSO: Tensor) -> Tensor:
        out_TSI = linear(d_TSO, self._weight_IO)
        if self._moved is None:
            return out_TSI
        inputs_TMI, d_TMO = self._moved
        gram_TSM = torch.bmm(d_TSO, d_TMO.transpose(1, 2))
        return torch.baddbmm(out_TSI, gram_TSM * self._weight_size_T11, inputs_TMI, alpha=-1)

    def move(self, x_TSI: Tensor, d_TSO: Tensor) -> None:
        if self._moved is None:
            self._moved = x_TSI, d_TSO
        elif x_TSI is self._constant_TSI:
            self._moved = x_TSI, self._moved[1] + d_TSO
        else:
            self._moved = torch.cat([self._moved[0], x_TSI], dim=1), torch.cat([self._moved[1], d_TSO], dim=1)

    def _base(self, x_TSI: Tensor) -> Tensor:
        return self._keep("base", x_TSI, lambda: linear(x_TSI, self._weight_IO.t(), self._bias_O))

    def _kernel(self, x_TSI: Tensor, inputs_TMI: Tensor) -> Tensor:
        def kernel() -> Tensor:
            gram_TSM = torch.bmm(x_TSI, inputs_TMI.transpose(1, 2))
            return torch.addcmul(self._bias_size_T11, gram_TSM, self._weight_size_T11)

        return self._keep("kernel", x_TSI, kernel)

    def _keep(self, name: str, x_TSI: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, once for the constant inputs; what was made without a graph is not taken where one is needed."""
        if x_TSI is not self._constant_TSI:
            return make()
        key = name, torch.is_grad_enabled()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def _layer(
    mlp: Mapping[str, Tensor], sizes: Params, number: int, *, num_rows: int, constant_TSI: Tensor | None
) -> GramLayer | BuiltLayer:
    """The form that costs less: a Gram matrix needs one step size for all weights, and grows with the square of the rows."""
    weight_IO, bias_O = mlp[f"weight{number}"], mlp[f"bias{number}"]
    weight_size, bias_size = sizes[f"weight{number}"], sizes[f"bias{number}"]
    one_size = weight_size.shape[1:].numel() == 1 and bias_size.shape[1:].numel() == 1
    if one_size and num_rows <= min(weight_IO.shape):
        return GramLayer(weight_IO, bias_O, weight_size, bias_size, constant_TSI)
    return BuiltLayer(weight_IO, bias_O, weight_size, bias_size)
