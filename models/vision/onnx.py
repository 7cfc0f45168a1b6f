"""Just enough of the ONNX file format to take the weights out of a graph: messages of protocol buffers, read by number."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# ONNX's TensorProto.DataType of the types that weights and shapes have
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 11: np.float64}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One operation of a graph.

    Attributes:
        kind: name of the operator, such as ``"MatMul"``.
        name: the node's own name, often the path of the module it was traced from.
        inputs: names of the tensors that it reads.
        outputs: names of the tensors that it writes.
        value: the tensor of a ``Constant``.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: np.ndarray | None = None


@dataclass(frozen=True)
class Graph:
    """Operations in order, and the tensors that are stored with them.

    Attributes:
        nodes: the operations.
        tensors: name -> stored tensor.
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def read_graph(file: str | Path) -> Graph:
    """The graph of an ONNX file: ``read_graph("model.onnx").tensors["cls_token"]``.

    Nothing of it is executed. Field numbers are those of onnx.proto3.

    Raises:
        ValueError: the file is damaged, or keeps its weights in other files.
    """
    data = memoryview(Path(file).read_bytes())
    try:
        graph = next(value for number, value in _fields(data) if number == 7)
        nodes, tensors = [], {}
        for number, value in _fields(graph):
            if number == 1:
                nodes.append(_node(value))
            elif number == 5:
                name, tensor = _tensor(value)
                tensors[name] = tensor
    except (IndexError, StopIteration, UnicodeDecodeError, struct.error) as error:
        raise ValueError(
            f"{file} is no ONNX file, or damaged ({type(error).__name__}). Install its package again."
        ) from error
    return Graph(tuple(nodes), tensors)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a message; numbers as their eight bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, place = _varint(data, place)
            yield number, memoryview(struct.pack("<Q", value))
        elif wire == BYTES:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise IndexError("a field ends after its message")
            yield number, data[place : place + length]
            place += length
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
            yield number, data[place : place + length]
            place += length
        else:
            raise IndexError(f"wire type {wire}")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value & (2**64 - 1), place


def _number(value: memoryview) -> int:
    return struct.unpack("<q", value)[0]


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _node(data: memoryview) -> Node:
    kind = name = ""
    inputs, outputs, stored = [], [], None
    for number, value in _fields(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            kind = _text(value)
        elif number == 5:
            stored = next((_tensor(inner)[1] for part, inner in _fields(value) if part == 5), stored)
    return Node(kind, name, tuple(inputs), tuple(outputs), stored)


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
    name, shape, kind = "", [], 1
    raw: memoryview | None = None
    floats: list[memoryview] = []
    for number, value in _fields(data):
        if number == 1:
            # one number a field, or all of them packed into one
            shape += [_number(value)] if len(value) == 8 else _packed(value)
        elif number == 2:
            kind = _number(value)
        elif number == 4:
            floats.append(value)
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = value
        elif number == 13:
            raise ValueError(f"The tensor {name!r} lies in another file, which is not read.")
    if raw is None:
        raw = memoryview(b"".join(floats))
    if kind not in DTYPES:
        return name, np.empty(0)
    dtype = np.dtype(DTYPES[kind])
    if len(raw) != int(np.prod(shape)) * dtype.itemsize:
        return name, np.empty(0, dtype)
    return name, np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape)


def _packed(data: memoryview) -> list[int]:
    place, found = 0, []
    while place < len(data):
        value, place = _varint(data, place)
        found.append(value)
    return found
