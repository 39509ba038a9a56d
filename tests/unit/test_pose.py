"""Poses: read from pictures by ONNX files of the true shapes, drawn, carried over, cut out, masked."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.neutral import sentence
from kinema.planning.geometry import size_within
from kinema.pose.keypoints import LEFT_HIP, LIMBS, NECK, RIGHT_HIP, RIGHT_WRIST, Pose
from kinema.pose.outline import OutlineReader, prompt
from kinema.pose.reader import PoseReader, heatmap_peaks, largest_person
from kinema.pose.regions import blocked, box_mask, crop, face_box, grown
from kinema.pose.retarget import retarget, stretched
from kinema.pose.skeleton import COLOURS, draw
from onnx_files import body_points, person_detector, segmenter

# Nose, neck, right shoulder ... of a person who stands with arms down, in a frame of 200 x 400.
STANDING = (
    (100, 60), (100, 100), (70, 100), (60, 150), (55, 200), (130, 100), (140, 150), (145, 200), (85, 200), (85, 270),
    (85, 340), (115, 200), (115, 270), (115, 340), (95, 55), (105, 55), (90, 60), (110, 60), (125, 355), (75, 355),
)  # fmt: skip


def person(scale: float = 1.0, shift: tuple[float, float] = (0, 0), size: tuple[int, int] = (200, 400)) -> Pose:
    def points(places: object) -> np.ndarray:
        found = np.asarray(places, dtype=float) * scale + shift
        return np.concatenate([found, np.ones((len(found), 1))], axis=1)

    face = [(90 + 20 * (n % 2), 45 + 30 * n / 67) for n in range(68)]
    hands = tuple(points([(x + n % 3, 200 + n) for n in range(21)]) for x in (145, 55))
    box = (50 * scale + shift[0], 30 * scale + shift[1], 150 * scale + shift[0], 360 * scale + shift[1])
    return Pose(*size, points(STANDING), points(face), hands, box)


# --- reading ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PoseReader:
    folder = tmp_path_factory.mktemp("onnx")
    boxes = [
        (0, 0, 640, 640, 0.9, 62),  # a television
        (100, 50, 500, 600, 0.6, 0),
        (110, 60, 490, 590, 0.5, 0),  # the same person again
        (0, 0, 60, 60, 0.95, 0),  # somebody far away
        (0, 0, 640, 640, 0.04, 0),  # a crowd of nothing
    ]
    return PoseReader(person_detector(folder / "det.onnx", boxes), body_points(folder / "points.onnx"))


def dot(width: int, height: int, x: float, y: float, sigma: float) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    glow = 255 * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 2 / sigma**2)
    return glow.round().to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()


def test_the_largest_person_is_found(reader: PoseReader):
    frame = torch.full((320, 1280, 3), 200, dtype=torch.uint8)
    assert reader.find(frame) == pytest.approx((200, 25, 1000, 300))
    assert reader.find(torch.zeros(320, 1280, 3, dtype=torch.uint8)) is None, "a black frame shows nobody"
    assert reader(torch.zeros(64, 64, 3, dtype=torch.uint8)) is None


def test_boxes_are_chosen_by_size_then_shape():
    assert largest_person(np.zeros((0, 5))) is None
    tall, wide = (0, 0, 10, 300, 0.2), (400, 0, 500, 100, 0.9)
    assert largest_person(np.array([tall, wide])) == (0, 0, 10, 300), "the wide one is too short against the tall one"
    near = (400, 0, 500, 150, 0.1)
    assert largest_person(np.array([near, (600, 0, 650, 160, 0.9)])) == near[:4]
    assert largest_person(np.array([(0, 0, 100, 100, 0.2), (0, 0, 90, 90, 0.9)])) == (0, 0, 90, 90), "a double of it"


@pytest.mark.parametrize(("x", "y"), [(640.0, 300.0), (431.5, 180.25), (900.0, 500.0)])
def test_points_come_back_where_they_are(reader: PoseReader, x: float, y: float):
    """Cut, shrunk to 192 x 256, read off a heatmap of 48 x 64 and put back: within an eighth of a heatmap's cell."""
    points = reader.read(dot(1280, 640, x, y, 40), (250, 60, 1050, 620))
    cell = 1.25 * max(800 * 256 / 192, 560) / 64
    assert points.shape == (133, 3)
    assert np.abs(points[:, :2] - (x, y)).max() < cell / 8, (points[0], cell)


def test_a_box_over_the_edge_is_black_outside(reader: PoseReader):
    points = reader.read(dot(200, 100, 4, 50, 6), (-60, 20, 40, 90))
    assert np.abs(points[0, :2] - (4, 50)).max() < 3


def test_a_tiny_box_looks_at_the_whole_frame(reader: PoseReader):
    frame = dot(200, 100, 150, 30, 6)
    assert np.allclose(reader.read(frame, (10, 10, 15, 90)), reader.read(frame, (0, 0, 200, 100)))


@pytest.mark.parametrize("place", [(20.0, 30.0), (20.3, 30.4), (11.6, 40.75)])
def test_a_peak_between_cells_is_found(place: tuple[float, float]):
    x, y = place
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
    heat = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)[None].repeat(3, 1, 1)
    peaks, scores = heatmap_peaks(heat)
    assert torch.allclose(peaks, torch.tensor([[x, y]]).expand(3, 2), atol=0.02)
    assert torch.allclose(scores, heat.amax((1, 2)))


def test_a_peak_at_the_edge_and_a_flat_map_stay_whole():
    edge, flat = torch.zeros(1, 64, 48), torch.zeros(1, 64, 48)
    edge[0, 0, 47] = 1
    assert heatmap_peaks(edge)[0].tolist() == [[47, 0]]
    peaks, scores = heatmap_peaks(flat)
    assert torch.isfinite(peaks).all() and scores.tolist() == [0]


def test_files_of_another_kind_are_refused(tmp_path: Path):
    detector = person_detector(tmp_path / "det.onnx", [(0, 0, 640, 640, 0.9, 0)])
    with pytest.raises(CheckpointError, match="something else than a pose network"):
        PoseReader(detector, body_points(tmp_path / "17.onnx", points=17))(
            torch.full((64, 64, 3), 9, dtype=torch.uint8)
        )
    with pytest.raises(CheckpointError, match="something else than a person detector"):
        points = body_points(tmp_path / "points.onnx")
        PoseReader(points, points).find(torch.zeros(64, 64, 3, dtype=torch.uint8))
    (tmp_path / "broken.onnx").write_bytes(b"no onnx")
    with pytest.raises(CheckpointError, match="cannot be read as an ONNX file"):
        PoseReader(tmp_path / "broken.onnx", detector)


def test_the_skeleton_is_20_of_133_points():
    points = np.arange(133 * 3, dtype=float).reshape(133, 3)
    pose = Pose.of(points, (10, 20), (0, 0, 1, 1))
    assert (
        pose.body.shape == (20, 3) and pose.face.shape == (68, 3) and pose.hands[1][0].tolist() == points[112].tolist()
    )
    assert pose.body[NECK].tolist() == ((points[5] + points[6]) / 2).tolist()
    assert pose.body[RIGHT_WRIST].tolist() == points[10].tolist()
    assert pose.body[18].tolist() == ((points[17] + points[18]) / 2).tolist()


# --- drawing ---------------------------------------------------------------------------------------


def test_a_skeleton_is_drawn_in_its_colours():
    picture = draw(person(), 200, 400)
    assert picture.shape == (400, 200, 3) and picture.dtype == torch.uint8
    for (x, y), colour in zip(STANDING[:14], COLOURS, strict=False):
        assert tuple(picture[y, x].tolist()) in {colour, (0, 0, 255)}, "a joint, or the hand that lies on it"
    assert tuple(picture[305, 85].tolist()) == tuple(int(0.6 * part) for part in COLOURS[8]), "the right calf"
    assert not picture[:40].any() and not picture[:, :40].any()


def test_what_was_not_seen_is_not_drawn():
    unseen = person()
    unseen.body[:, 2] = 0.49
    for hand in unseen.hands:
        hand[:, 2] = 0.49
    assert not draw(unseen, 200, 400).any()
    assert not draw(None, 200, 400).any()


def test_lines_grow_with_the_canvas():
    small, large = (draw(person().fitted(200 * n, 400 * n), 200 * n, 400 * n) for n in (1, 6))
    widths = [int((picture[305 * n].sum(-1) > 0).sum()) for n, picture in ((1, small), (6, large))]
    assert widths[0] <= 2 * 3 and widths[1] > 2 * widths[0]


# --- another body ----------------------------------------------------------------------------------


def test_the_same_body_stays_where_it_is():
    pose = person()
    again = retarget(pose, pose)(pose)
    assert np.allclose(again.body[:18], pose.body[:18])
    assert np.allclose(again.hands[0][:, :2] - again.hands[0][0, :2], pose.hands[0][:, :2] - pose.hands[0][0, :2])


def test_a_smaller_picture_of_the_same_body_is_only_smaller():
    driver, reference = person(), person(0.5, (30, 20), (300, 200))
    moved = retarget(driver, reference)(driver)
    assert (moved.width, moved.height) == (300, 200)
    assert np.allclose(moved.body[:18, :2], reference.body[:18, :2], atol=8), "feet on the same ground"
    lengths = [np.hypot(*(pose.body[2, :2] - pose.body[3, :2])) for pose in (moved, reference)]
    assert lengths[0] == pytest.approx(lengths[1])


def test_limbs_take_the_reference_s_length_and_the_driver_s_direction():
    driver, reference = person(), person()
    reference.body[[3, 4], 1] += (50, 100)  # a right arm twice as long
    raised = replace(driver, body=driver.body.copy())
    raised.body[3, :2] = raised.body[2, :2] + (-50, 0)
    raised.body[4, :2] = raised.body[3, :2] + (-50, 0)
    change = retarget(driver, reference)
    moved = change(raised)
    upper = moved.body[3, :2] - moved.body[2, :2]
    assert upper[1] == pytest.approx(0, abs=1e-6) and upper[0] < 0, "as the driver holds it"
    wanted = np.hypot(*(reference.body[3, :2] - reference.body[2, :2])) / np.hypot(
        *(driver.body[3, :2] - driver.body[2, :2])
    )
    assert -upper[0] == pytest.approx(50 * wanted)
    left, right = (np.hypot(*(moved.body[end, :2] - moved.body[start, :2])) for start, end in ((5, 6), (2, 3)))
    assert left / np.hypot(*(driver.body[6, :2] - driver.body[5, :2])) == pytest.approx(right / 50), "both arms alike"
    assert np.allclose(moved.hands[1][0, :2], moved.body[RIGHT_WRIST, :2]), "the hand goes with its wrist"


def test_a_foot_is_at_most_half_a_calf():
    body = person().body
    ratios = np.ones(len(LIMBS))
    ratios[18] = 40
    calf = math.hypot(*(body[9, :2] - body[10, :2]))
    points = stretched(body, ratios)
    assert math.hypot(*(points[19] - points[10])) == pytest.approx(calf / 2)


def test_half_a_body_hangs_on_its_neck():
    driver, reference = person(), person(1.0, (20, 10))
    for pose in (driver, reference):
        pose.body[[RIGHT_HIP, LEFT_HIP], 2] = 0.1
    moved = retarget(driver, reference)(driver)
    assert np.allclose(moved.body[NECK, :2], reference.body[NECK, :2])


def test_a_body_seen_end_on_has_finite_limbs():
    flat = person()
    flat.body[:, :2] = 50
    assert np.isfinite(retarget(flat, person())(flat).body).all()


def test_limbs_are_measured_in_a_neutral_pose_where_there_is_one():
    """A driver who holds the arms towards the camera, and pictures of both that show people larger or smaller."""
    driver, longer = person(), person()
    driver.body[[3, 4, 6, 7], :2] = driver.body[[2, 2, 5, 5], :2] + (0, 3)
    longer.body[[3, 4], 1] += (50, 100)
    wanted = retarget(person(), longer).ratios
    small = replace(longer, body=longer.body * (0.5, 0.5, 1))
    change = retarget(driver, longer, (person(2.0), small))
    assert np.allclose(change.ratios, wanted) and not np.allclose(retarget(driver, longer).ratios, wanted)
    assert change.scale == retarget(driver, longer).scale, "where they stand is read from the pictures at hand"


def test_half_a_body_in_a_neutral_pose_is_as_large_as_it_was():
    def half(scale: float) -> Pose:
        pose = person(scale)
        pose.body[[RIGHT_HIP, LEFT_HIP, 10, 13], 2] = 0.1
        return pose

    assert np.allclose(retarget(half(1.0), half(1.0), (half(2.0), half(0.5))).ratios, 1)


def test_a_sentence_asks_for_what_the_driver_shows():
    whole, half, head = person(), person(), person()
    half.body[[9, 10, 12, 13], 2] = 0.6
    head.body[2:14, 2] = 0.6
    assert "straight down" in sentence([None, half, whole], 200, 400) and "feet" in sentence([whole], 200, 400)
    assert "T-pose" in sentence([whole], 400, 200) and "feet" not in sentence([half], 400, 200)
    assert sentence([head, None], 200, 400) == sentence([], 400, 200) == "Turn the person to face the camera."


# --- faces and masks -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> OutlineReader:
    encoder = segmenter(tmp_path_factory.mktemp("sam2"))
    return OutlineReader(encoder, encoder.with_name("sam2_hiera_tiny.decoder.onnx"))


def test_an_outline_is_asked_for_where_the_person_is(outline: OutlineReader):
    """The best of three masks, at the frame's own size; of two bright things the one under the skeleton."""
    frame = torch.zeros(400, 200, 3, dtype=torch.uint8)
    frame[40:360, 40:160] = 200
    frame[:30] = 90
    mask = outline(frame, person())
    assert mask.shape == (400, 200) and mask.dtype == torch.bool
    ys, xs = torch.nonzero(mask, as_tuple=True)
    assert [int(edge) for edge in (xs.min(), ys.min(), xs.max(), ys.max())] == pytest.approx([40, 40, 159, 359], abs=6)
    far = person(shift=(0, -50))  # its nose is in the upper stripe
    assert outline(frame, far)[10, 100] and not mask[10, 100]
    assert not outline(frame, None).any()


def test_what_says_where_the_person_is():
    pose = person()
    points, labels = prompt(pose)
    assert points.tolist() == [[x, y] for x, y in (STANDING[n] for n in (0, 1, 2, 5, 8, 11, 10, 13))]
    assert labels.tolist() == [1] * 8
    pose.body[10, 2], pose.body[13, 1] = 0.4, 400  # one that was not seen, one below the frame
    assert len(prompt(pose)[0]) == 6
    pose.body[:, 2] = 0.1
    points, labels = prompt(pose)
    assert points.tolist() == [[50, 30], [150, 360]] and labels.tolist() == [2, 3], "the corners of the box"


def test_other_files_than_those_of_sam2_are_refused(tmp_path: Path):
    encoder = segmenter(tmp_path)
    decoder = encoder.with_name("sam2_hiera_tiny.decoder.onnx")
    other = body_points(tmp_path / "points.onnx")
    for one, two in ((other, decoder), (encoder, other), (encoder, encoder)):
        with pytest.raises(CheckpointError, match="is not of SAM 2 as samexporter writes it"):
            OutlineReader(one, two)


def test_the_face_box_is_one_point_three_times_the_face():
    x0, y0, x1, y1 = face_box(person()) or (0, 0, 0, 0)
    assert (x1 - x0) * (y1 - y0) == pytest.approx(1.3 * 20 * 30, rel=0.1)
    assert 45 - y0 > y1 - 75, "more of what is added lies above"
    assert face_box(person(shift=(-500, 0))) is None
    point = person()
    point.face[:, :2] = 50
    assert face_box(point) is None


def test_a_face_is_cut_out_square():
    frame = torch.zeros(400, 200, 3, dtype=torch.uint8)
    frame[45:75, 90:110] = 255
    face = crop(frame, (90, 45, 110, 75), 512)
    assert face.shape == (512, 512, 3) and int(face.min()) == 255


def test_a_mask_grows_by_nine_pixels():
    mask = torch.zeros(60, 60, dtype=torch.bool)
    mask[30, 30] = True
    wide = grown(mask)
    assert int(wide.sum()) == 19 * 19 and bool(wide[21, 21]) and not bool(wide[20, 30])


def test_blocks():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:20, 10] = mask[19, 10:30] = True
    box = blocked(mask)
    assert int(box.sum()) == 10 * 20 and bool(box[19, 29]), "the last row and column belong to it"
    cells = blocked(mask, columns=2, rows=2)
    assert not bool(cells[10, 29]) and bool(cells[10, 10]) and bool(cells[19, 29]), "a cell without a pixel stays empty"
    assert not blocked(torch.zeros(40, 40, dtype=torch.bool)).any(), "an empty mask stays empty"
    thin = torch.zeros(40, 40, dtype=torch.bool)
    thin[5, 5] = True
    assert int(blocked(thin, columns=10, rows=20).sum()) == 1, "narrower than its cells"


def test_the_box_of_a_person_takes_in_what_sticks_out():
    pose = person()
    pose.hands[0][5, :2] = (190, 20)
    mask = box_mask(pose, 200, 400)
    assert bool(mask[20, 189]) and bool(mask[359, 50]) and not bool(mask[10, 100])
    pose.hands[0][5, 2] = 0.2
    assert not bool(box_mask(pose, 200, 400)[20, 189]), "a point hardly seen does not count"
    assert not box_mask(None, 200, 400).any()


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1920, 1080), (1280, 720)), ((1080, 1920), (720, 1280)), ((512, 512), (960, 960)), ((640, 480), (1104, 832))],
)
def test_the_most_pixels_within_an_area(size: tuple[int, int], wanted: tuple[int, int]):
    assert size_within(*size, 1280 * 720) == wanted
