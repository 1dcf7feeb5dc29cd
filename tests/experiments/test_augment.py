"""Crops, flips and distorted colours show the right places and have the right distribution."""

import io
import math

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from experiments.images import augment


def rngs(n, seed=0):
    return [np.random.default_rng((seed, i)) for i in range(n)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def map_of(width, height):
    """Makes an image whose red is x and whose green is y, from 0 to 255."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack(np.broadcast_arrays(x, y[:, None], 0 * x), -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def seen(view, width, height):
    """Returns left, top, right and bottom of what a view shows of a map [pixels of the map]."""
    x, y = view[..., 0].mean(0, dtype=float), view[..., 1].mean(1, dtype=float)
    edges = []
    for values, side in ((x, width), (y, height)):
        step = (values[-2] - values[1]) / (len(values) - 3)  # a map's border is one half pixel flat
        edges.append([(v + 127.5 / (side - 1)) * (side - 1) / 255
                      for v in (values[1] - 1.5 * step, values[-2] + 1.5 * step)])  # fmt: skip
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def assert_uniform(values, low, high):
    """Makes the test of Kolmogorov and Smirnov, which one seed in a thousand would fail."""
    values = np.sort(values)
    distance = abs(
        (values - low) / (high - low) - np.arange(1, len(values) + 1) / len(values)
    ).max()
    assert distance < 1.95 / math.sqrt(len(values))


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, **options)
    return Image.open(buffer)


# --- Squares -------------------------------------------------------------------------------------


def test_a_square_of_its_own_size_is_copied():
    pixels = noise(20, 30, 3)
    np.testing.assert_array_equal(
        augment.square(Image.fromarray(pixels), (7, 4, 19, 16), 12), pixels[4:16, 7:19]
    )


def test_a_square_shows_its_box():
    box = (50.0, 20.0, 350.0, 280.0)
    view = augment.square(map_of(500, 400), box, 64)
    assert view.shape == (64, 64, 3)
    assert view.dtype == np.uint8
    np.testing.assert_allclose(seen(view, 500, 400), box, atol=2)  # 1/255 of the map is 2 pixels


@pytest.mark.parametrize(("box", "decoded"), [
    ((0, 0, 2000, 1500), (500, 375)),  # 1/8 would have 188 rows, fewer than are wanted
    ((100, 100, 600, 600), (1000, 750)),
    ((100, 100, 300, 300), (2000, 1500)),
])  # fmt: skip
def test_a_large_jpeg_is_decoded_no_larger_than_needed(box, decoded):
    picture = map_of(2000, 1500)
    image = jpeg(np.asarray(picture))
    view = augment.square(image, box, 224)
    assert image.size == decoded
    whole = augment.square(picture, box, 224)
    # The difference comes from JPEG's own loss and from two ways to shrink an image.
    np.testing.assert_allclose(view.astype(float), whole.astype(float), atol=6)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_any_image_becomes_red_green_and_blue(mode):
    image = map_of(40, 30).convert(mode)
    for view in (augment.centre_crop(image, 8), augment.square(image, (0, 0, 10, 10), 8)):
        assert view.shape == (8, 8, 3)


# --- Training ------------------------------------------------------------------------------------


def test_boxes_of_random_crops():
    """Compares area and aspect with GoogLeNet's, where every box of that area fits the image."""
    side = 10_000  # so that rounding to pixels does not matter
    boxes = np.array([augment.random_box(side, side, rng) for rng in rngs(4000)])
    left, top, right, bottom = boxes.T
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= side).all()
    width, height = right - left, bottom - top
    area = width * height / side**2
    small = area < 0.75
    assert_uniform(area[small], 0.08, 0.75)
    assert_uniform(np.log(width / height)[small], math.log(3 / 4), math.log(4 / 3))
    assert_uniform(left[small] / (side - width[small]), 0, 1)
    assert_uniform(top[small] / (side - height[small]), 0, 1)
    assert area.max() > 0.95


@pytest.mark.parametrize(("width", "height", "box"), [
    (10_000, 4, (4997.333, 0, 5002.667, 4)),  # 5.33 x 4, in the middle
    (4, 10_000, (0, 4997.333, 4, 5002.667)),
])  # fmt: skip
def test_an_image_that_no_box_fits_into_shows_its_middle(width, height, box):
    for rng in rngs(20):
        assert augment.random_box(width, height, rng) == pytest.approx(box, abs=1e-3)


def test_a_resized_crop_is_a_box_of_the_image():
    picture = map_of(500, 400)
    for rng, again in zip(rngs(5), rngs(5), strict=True):
        view = augment.resized_crop(picture, rng, 64)
        box = augment.random_box(500, 400, again)
        np.testing.assert_allclose(seen(view, 500, 400), box, atol=4)


def test_shifts_are_crops_of_the_padded_image():
    pixels = noise(32, 32, 3)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    cut = {padded[y : y + 32, x : x + 32].tobytes() for y in range(9) for x in range(9)}
    got = [augment.shift_crop(pixels, rng).tobytes() for rng in rngs(1000)]
    assert set(got) == cut
    assert max(map(got.count, cut)) < 1000 / 81 * 2.5  # 4 standard deviations


def test_half_of_the_images_are_flipped():
    pixels = noise(3, 4, 3)
    flipped = 0
    for rng in rngs(1000):
        view = augment.flip(pixels, rng)
        same = np.array_equal(view, pixels)
        assert same or np.array_equal(view, pixels[:, ::-1])
        flipped += not same
    assert 440 < flipped < 560  # 4 standard deviations


def distorted(pixels, rng, distortion, order):
    """Applies Howard's three manipulations in a given order, and the light; clips at the end."""
    x, grey = pixels.astype(np.float64), augment.GRAY.astype(np.float64)
    b, c, s = 1 + distortion.enhance * rng.uniform(-1, 1, 3)
    a = distortion.light * rng.standard_normal(3)
    for name in order:
        if name == "brightness":
            x = b * x
        elif name == "contrast":
            mean = (x @ grey).mean()
            x = mean + c * (x - mean)
        else:
            luma = (x @ grey)[..., None]
            x = luma + s * (x - luma)
    x = x + augment.LIGHT_DIRECTIONS @ (a * augment.LIGHT)
    return np.floor(x + 0.5).clip(0, 255)


@pytest.mark.parametrize("strength", ["full", "reduced"])
@pytest.mark.parametrize("order", [
    ("brightness", "contrast", "saturation"),
    ("saturation", "brightness", "contrast"),
    ("contrast", "saturation", "brightness"),
])  # fmt: skip
def test_distortions_are_those_of_the_paper_in_any_order(order, strength):
    images, distortion = noise(6, 8, 12, 3), augment.DISTORTIONS[strength]
    got = augment.distort(images, rngs(6), distortion)
    assert got.dtype == np.uint8
    expected = [distorted(*pair, distortion, order) for pair in zip(images, rngs(6), strict=True)]
    # Where a value is halfway between two integers, float32 may round it to the other one.
    assert abs(got - np.stack(expected)).max() <= 1
    assert (got != np.stack(expected)).mean() < 1e-2


def test_distortions_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    images = noise(5, 16, 16, 3)
    together = augment.distort(images, rngs(5), augment.DISTORTIONS["full"])
    monkeypatch.setattr(augment, "AT_ONCE", 2 * 16 * 16)
    np.testing.assert_array_equal(
        together, augment.distort(images, rngs(5), augment.DISTORTIONS["full"])
    )


def test_brightness_changes_by_as_much_as_the_strength_says():
    """Takes grey images, which contrast and saturation do not change; the light adds a little."""
    grey = np.full((500, 4, 4, 3), 100, np.uint8)
    for name, most in (("full", 0.5), ("reduced", 0.25)):
        means = augment.distort(grey, rngs(500), augment.DISTORTIONS[name]).mean((1, 2, 3))
        assert 100 * (1 - most) - 25 < means.min() < 100 * (1 - 0.8 * most)
        assert 100 * (1 + 0.8 * most) < means.max() < 100 * (1 + most) + 25
        assert abs(means.mean() - 100) < 5
    same = augment.distort(grey, rngs(500), augment.DISTORTIONS["none"])
    np.testing.assert_array_equal(same, grey)


# --- Evaluation ----------------------------------------------------------------------------------


def test_the_centre_of_a_small_image_is_the_image():
    pixels = noise(32, 32, 3)
    np.testing.assert_array_equal(augment.centre_crop(Image.fromarray(pixels), 32), pixels)


def test_the_centre_crop_is_224_of_256_of_the_shorter_side():
    """Expects a square of 350 pixels, as the shorter side of the image has 400."""
    view = augment.centre_crop(map_of(500, 400), 64)
    np.testing.assert_allclose(seen(view, 500, 400), (75, 25, 425, 375), atol=2)


@pytest.mark.parametrize(("width", "height"), [(500, 400), (400, 500), (400, 400)])
def test_144_crops(width, height):
    """Computes from GoogLeNet's text where each crop lies, in pixels of the image."""
    views = augment.crops_144(map_of(width, height), 56)
    assert views.shape == (144, 56, 56, 3)
    assert views.dtype == np.uint8
    np.testing.assert_array_equal(views[1::2], views[::2, :, ::-1])
    expected = []
    for side in (256, 288, 320, 352):
        part = 400 * 224 / side  # of the image, that a crop of 224 shows
        for place in (0, 0.5, 1):
            left, top = place * (width - 400), place * (height - 400)
            far = 400 - part
            corners = (0, 0), (far, 0), (0, far), (far, far), (far / 2, far / 2)
            expected += [(left + x, top + y, left + x + part, top + y + part) for x, y in corners]
            expected.append((left, top, left + 400, top + 400))
    got = [seen(view, width, height) for view in views[::2]]
    # A pixel of a crop covers up to 7 of the image, and crops begin at whole pixels.
    np.testing.assert_allclose(got, expected, atol=7)


def test_144_crops_of_a_large_jpeg_use_enough_of_it():
    image = jpeg(np.asarray(map_of(2000, 1500)))
    views = augment.crops_144(image, 56)
    assert image.size == (250, 188)  # at least 88, the largest side that the crops need
    assert views.shape == (144, 56, 56, 3)
