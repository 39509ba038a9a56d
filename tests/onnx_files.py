"""ONNX files of the shapes that looking at frames takes, small enough to be made in a test."""

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


def segmenter(folder: Path, name: str = "sam2_hiera_tiny", side: int = 1024) -> Path:
    """Write SAM 2's encoder and decoder, in the names and shapes of samexporter; return where the encoder is.

    image_embed is the picture's brightness in each of 64 x 64 cells, and the decoder's second mask, which says that it
    is the best of three, is where that is no less than half of what it is under the prompt's first point; the others
    are empty.
    """
    picture = helper.make_tensor_value_info("image", FLOAT, [1, 3, side, side])
    features = [
        ("high_res_feats_0", [1, 32, side // 4, side // 4]),
        ("high_res_feats_1", [1, 64, side // 8, side // 8]),
        ("image_embed", [1, 256, side // 16, side // 16]),
    ]
    mean = np.full((1, 3, 1, 1), 1 / 3, np.float32)
    black = np.array([(0.485 / 0.229 + 0.456 / 0.224 + 0.406 / 0.225) / 3], np.float32)
    nodes = [helper.make_node("Conv", ["image", "mean", "black"], ["grey"], kernel_shape=[1, 1])]
    ones = {}
    for (feature, (_, channels, rows, _)), stride in zip(features, (4, 8, 16), strict=True):
        pool = {"kernel_shape": [stride, stride], "strides": [stride, stride]}
        nodes.append(helper.make_node("AveragePool", ["grey"], [f"{feature}_grey"], **pool))
        nodes.append(helper.make_node("Conv", [f"{feature}_grey", f"{feature}_copies"], [feature], kernel_shape=[1, 1]))
        ones[f"{feature}_copies"] = np.ones((channels, 1, 1, 1), np.float32)
        assert rows == side // stride
    outputs = [helper.make_tensor_value_info(feature, FLOAT, shape) for feature, shape in features]
    encoder = _save(folder / f"{name}.encoder.onnx", nodes, [picture], outputs, mean=mean, black=black, **ones)

    nodes = [
        # Level of the cell under the first point: its column and row, 16 pixels a cell.
        helper.make_node("Slice", ["point_coords", "zero2", "one2", "axes12"], ["first"]),
        helper.make_node("Mul", ["first", "cell"], ["where"]),
        helper.make_node("Cast", ["where"], ["column_row"], to=TensorProto.INT64),
        helper.make_node("Slice", ["image_embed", "zero1", "one1", "axis1"], ["grey"]),
        helper.make_node("Gather", ["column_row", "row_index"], ["row"], axis=2),
        helper.make_node("Gather", ["column_row", "column_index"], ["column"], axis=2),
        helper.make_node("Reshape", ["row", "one1"], ["row1"]),
        helper.make_node("Reshape", ["column", "one1"], ["column1"]),
        helper.make_node("Gather", ["grey", "row1"], ["line"], axis=2),
        helper.make_node("Gather", ["line", "column1"], ["level"], axis=3),
        helper.make_node("Mul", ["level", "half"], ["limit"]),
        helper.make_node("Sub", ["grey", "limit"], ["inside64"]),
        helper.make_node("Resize", ["inside64", "", "by4"], ["inside"], mode="nearest"),
        # What else is asked for has to be of its shape, and no mask is put in.
        helper.make_node("ReduceSum", ["mask_input"], ["put_in"], keepdims=0),
        helper.make_node("ReduceSum", ["has_mask_input"], ["has"], keepdims=0),
        helper.make_node("ReduceMax", ["point_labels"], ["label"], keepdims=0),
        helper.make_node("Add", ["put_in", "has"], ["put"]),
        helper.make_node("Sub", ["inside", "put"], ["best"]),
        helper.make_node("Mul", ["best", "nothing"], ["zeros"]),
        helper.make_node("Sub", ["zeros", "label"], ["empty"]),
        helper.make_node("Concat", ["empty", "best", "empty"], ["masks"], axis=1),
        helper.make_node("Identity", ["scores"], ["iou_predictions"]),
        helper.make_node("ReduceSum", ["high_res_feats_0"], ["unused0"], keepdims=0),
        helper.make_node("ReduceSum", ["high_res_feats_1"], ["unused1"], keepdims=0),
    ]
    cells = side // 4
    inputs = [helper.make_tensor_value_info(feature, FLOAT, shape) for feature, shape in reversed(features)]
    inputs[1:] = inputs[:0:-1]
    inputs += [
        helper.make_tensor_value_info("point_coords", FLOAT, ["num_labels", "num_points", 2]),
        helper.make_tensor_value_info("point_labels", FLOAT, ["num_labels", "num_points"]),
        helper.make_tensor_value_info("mask_input", FLOAT, ["num_labels", 1, cells, cells]),
        helper.make_tensor_value_info("has_mask_input", FLOAT, ["num_labels"]),
    ]
    outputs = [
        helper.make_tensor_value_info("masks", FLOAT, [1, 3, cells, cells]),
        helper.make_tensor_value_info("iou_predictions", FLOAT, [1, 3]),
    ]
    constants = {
        "zero1": np.zeros(1, np.int64), "one1": np.ones(1, np.int64), "axis1": np.ones(1, np.int64),
        "zero2": np.zeros(1, np.int64), "one2": np.ones(1, np.int64), "axes12": np.ones(1, np.int64),
        "cell": np.float32(1 / 16), "half": np.float32(0.5), "nothing": np.float32(0),
        "row_index": np.ones(1, np.int64), "column_index": np.zeros(1, np.int64),
        "by4": np.array([1, 1, 4, 4], np.float32), "scores": np.array([[0.2, 0.9, 0.1]], np.float32),
    }  # fmt: skip
    _save(folder / f"{name}.decoder.onnx", nodes, inputs, outputs, **constants)
    return encoder
