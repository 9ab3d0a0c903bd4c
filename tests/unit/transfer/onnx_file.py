"""A BERT encoder as an ONNX file, written field by field (onnx.proto of ONNX 1.16), so that no test needs the package onnx."""

import struct

import numpy as np

_FLOAT, _INT64 = 1, 7
_IR_VERSION, _OPSET = 9, 20


def varint(value: int) -> bytes:
    found = bytearray()
    value &= 2**64 - 1
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a message of protobuf; a message is the sum of its fields."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def value_info(name: str, kind: int, sizes: list[str | int]) -> bytes:
    dimensions = b"".join(field(1, field(1 if isinstance(size, int) else 2, size)) for size in sizes)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dimensions)))


def attribute(name: str, value: int | float | list[int]) -> bytes:
    if isinstance(value, list):
        return field(1, name) + b"".join(field(8, each) for each in value) + field(20, 7)
    return field(1, name) + (field(2, value) + field(20, 1) if isinstance(value, float) else field(3, value) + field(20, 2))


class Graph:
    """Collects nodes and constants; a value is known by its name."""

    def __init__(self) -> None:
        self._nodes, self._constants, self._count = b"", b"", 0

    def constant(self, value: np.ndarray | list[int] | int | float) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        self._count += 1
        name, kind = f"constant{self._count}", _FLOAT if array.dtype == np.float32 else _INT64
        sizes = b"".join(field(1, size) for size in array.shape)
        self._constants += field(5, sizes + field(2, kind) + field(8, name) + field(9, array.tobytes()))
        return name

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: int | float | list[int]) -> str:
        self._count += 1
        output = output or f"value{self._count}"
        given = b"".join(field(1, each) for each in inputs) + field(2, output) + field(4, operator)
        self._nodes += field(1, given + b"".join(field(5, attribute(*pair)) for pair in attributes.items()))
        return output

    def model(self, inputs: list[str], outputs: dict[str, list[str | int]]) -> bytes:
        """Inputs are (N, L) whole numbers, outputs as they are sized."""
        graph = self._nodes + field(2, "bert") + self._constants
        graph += b"".join(field(11, value_info(name, _INT64, ["N", "L"])) for name in inputs)
        graph += b"".join(field(12, value_info(name, _FLOAT, sizes)) for name, sizes in outputs.items())
        return field(1, _IR_VERSION) + field(7, graph) + field(8, field(1, "") + field(2, _OPSET))


def bert_as_onnx(weights, settings, *, kinds=True, output="last_hidden_state"):
    """The bytes of the network of `limaml.transfer.bert.hidden_states`; `kinds`: token_type_ids are an input."""
    graph, width = Graph(), settings["hidden_size"]

    def weight(name):
        return graph.constant(weights[name].numpy())

    def dense(x, name):
        product = graph.node("MatMul", x, graph.constant(weights[f"{name}.weight"].numpy().T))
        return graph.node("Add", product, weight(f"{name}.bias"))

    def norm(x, name):
        parts = [weight(f"{name}.LayerNorm.{part}") for part in ("weight", "bias")]
        return graph.node("LayerNormalization", x, *parts, axis=-1, epsilon=float(settings["layer_norm_eps"]))

    def split(x):
        heads = settings["num_attention_heads"]
        return graph.node("Reshape", x, graph.constant([0, 0, heads, width // heads]))

    length = graph.node("Gather", graph.node("Shape", "input_ids"), graph.constant(1))
    places = graph.node("Range", graph.constant(0), length, graph.constant(1))
    x = graph.node("Gather", weight("embeddings.word_embeddings.weight"), "input_ids")
    x = graph.node("Add", x, graph.node("Gather", weight("embeddings.position_embeddings.weight"), places))
    kind = "token_type_ids" if kinds else graph.constant(0)
    x = norm(graph.node("Add", x, graph.node("Gather", weight("embeddings.token_type_embeddings.weight"), kind)), "embeddings")
    seen = graph.node("Unsqueeze", graph.node("Cast", "attention_mask", to=_FLOAT), graph.constant([1, 2]))
    hidden = graph.node("Mul", graph.node("Sub", seen, graph.constant(1.0)), graph.constant(1e9))
    for number in range(settings["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        query, key, value = (split(dense(x, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        query, value = (graph.node("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, value))
        logits = graph.node("MatMul", query, graph.node("Transpose", key, perm=[0, 2, 3, 1]))
        logits = graph.node("Mul", logits, graph.constant((settings["num_attention_heads"] / width) ** 0.5))
        mixed = graph.node("MatMul", graph.node("Softmax", graph.node("Add", logits, hidden), axis=-1), value)
        mixed = graph.node("Reshape", graph.node("Transpose", mixed, perm=[0, 2, 1, 3]), graph.constant([0, 0, width]))
        x = norm(graph.node("Add", x, dense(mixed, f"{layer}.attention.output.dense")), f"{layer}.attention.output")
        grown = graph.node("Gelu", dense(x, f"{layer}.intermediate.dense"))
        x = norm(graph.node("Add", x, dense(grown, f"{layer}.output.dense")), f"{layer}.output")
    graph.node("Identity", x, output=output)
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kinds else [])]
    return graph.model(inputs, {output: ["N", "L", width]})
