"""ONNX files of the shapes that pose reading takes, small enough to be made in a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def _save(
    path: Path, nodes: Sequence[onnx.NodeProto], inputs: list[object], outputs: list[object], **values: object
) -> Path:
    weights = [
        numpy_helper.from_array(np.asarray(value, dtype=np.asarray(value).dtype), name)
        for name, value in values.items()
    ]
    graph = helper.make_graph(list(nodes), "small", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def person_detector(path: Path, boxes: Sequence[Sequence[float]], size: int = 640) -> Path:
    """Write a detector that sees `boxes` (x0, y0, x1, y1, score, class) in every picture that is not black."""
    rows = np.zeros((1, 300, 6), np.float32)
    for number, box in enumerate(boxes):
        rows[0, number] = box
    nodes = [
        helper.make_node("ReduceMax", ["picture"], ["brightest"], keepdims=0, axes=[0, 1, 2, 3]),
        helper.make_node("Sign", ["brightest"], ["seen"]),
        helper.make_node("Mul", ["boxes", "seen"], ["found"]),
    ]
    picture = helper.make_tensor_value_info("picture", FLOAT, [1, 3, size, size])
    found = helper.make_tensor_value_info("found", FLOAT, [1, 300, 6])
    return _save(path, nodes, [picture], [found], boxes=rows)


def body_points(path: Path, points: int = 133) -> Path:
    """Write a network whose heatmaps are the brightness of every fourth pixel: all points are where it is bright."""
    nodes = [
        helper.make_node("Conv", ["picture", "mean", "black"], ["grey"], kernel_shape=[1, 1], strides=[4, 4]),
        helper.make_node("Conv", ["grey", "copies"], ["heat"], kernel_shape=[1, 1]),
    ]
    picture = helper.make_tensor_value_info("picture", FLOAT, [1, 3, 256, 192])
    heat = helper.make_tensor_value_info("heat", FLOAT, [1, points, 64, 48])
    mean, copies = np.full((1, 3, 1, 1), 1 / 3, np.float32), np.ones((points, 1, 1, 1), np.float32)
    black = np.array([(0.485 / 0.229 + 0.456 / 0.224 + 0.406 / 0.225) / 3], np.float32)
    return _save(path, nodes, [picture], [heat], mean=mean, black=black, copies=copies)
