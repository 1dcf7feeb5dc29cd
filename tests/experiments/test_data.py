"""Images are read from folders, ordered and batched, by threads or workers, from any step on."""

import collections
import doctest
import functools
import itertools
import logging
import multiprocessing

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("grain")
pytest.importorskip("tqdm")

from PIL import Image

from experiments.images import augment, data, imagesets, photos, shuffling

CLASSES = ("ant", "bee", "cow")
SIZES = (40, 30), (30, 40), (64, 48), (33, 33)


def picture(seed, width, height):
    """Makes a smooth image, which JPEG hardly changes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture
def folder(tmp_path):
    """Classes of 6, 7 and 4 training images, with 2 validation images each, in four sizes."""
    for part, counts in (("train", (6, 7, 4)), ("val", (2, 2, 2))):
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            inside = tmp_path / part / name
            inside.mkdir(parents=True)
            for i in range(count):
                path = inside / f"{name}_{i}.JPEG"
                picture((label, i), *SIZES[i % 4]).save(path, quality=95)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_warned_of_yet(monkeypatch):
    monkeypatch.setattr(data, "_warned", set())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def numbered(n, side=4):
    """Makes n images in memory, each of a single colour, which is its number."""
    pixels = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, side, side, 3))
    return data.ImageSet(np.arange(n, dtype=np.int32) % 3, CLASSES, pixels=pixels.copy())


def numbers(batches, count):
    """Returns the numbers of the images of `count` batches, ``[count, batch]``."""
    return np.stack([batch["image"][:, 0, 0, 0] for batch in itertools.islice(batches, count)])


def take(batches, count):
    with_end = [next(batches) for _ in range(count)]
    batches.close()
    return with_end


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# --- From folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("second", ["val", "test"])
def test_each_folder_is_a_class(folder, second, in_memory):
    (folder / "val").rename(folder / second)
    (folder / "train" / "ant" / "._ant_0.JPEG").write_bytes(b"of another system")
    (folder / "train" / "ant" / "notes.txt").write_text("ignored")
    (folder / "train" / ".cache").mkdir()
    train, val = data.open_dataset(folder, in_memory=in_memory)
    assert train.classes == val.classes == CLASSES
    assert train.labels.dtype == np.int32
    assert train.labels.tolist() == [0] * 6 + [1] * 7 + [2] * 4
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (len(train), len(val)) == (17, 6)
    assert (train.pixels is not None) == bool(in_memory)
    for i, (label, number) in ((0, (0, 0)), (8, (1, 2)), (16, (2, 3))):
        loaded = train.load(i)
        assert loaded.dtype == np.uint8
        expected = np.asarray(picture((label, number), *SIZES[number % 4]), np.float64)
        assert abs(loaded - expected).mean() < 3
        assert train.path(i).endswith(f"{CLASSES[label]}_{number}.JPEG")


def test_sets_in_memory_and_in_files_are_the_same(folder):
    files, memory = (data.open_dataset(folder, in_memory=n)[0] for n in (0, 1 << 20))
    assert len({memory.load(i).shape for i in range(17)}) == 4
    # No image has twice this size on both sides, so that JPEGs are decoded at full size.
    wanted = {"batch": 5, "size": 32, "seed": 3, "distortion": "full"}
    assert_same(*(take(data.train_batches(images, **wanted), 4) for images in (files, memory)))


def test_images_of_one_size_become_one_array(folder):
    for path in folder.glob("*/*/*"):
        picture(0, 32, 32).save(path)
    train, _ = data.open_dataset(folder)
    assert train.pixels.shape == (17, 32, 32, 3)


def test_unusual_images_of_imagenet_are_read(folder, caplog):
    """Reads grey and CMYK images, a PNG named JPEG and EXIF; warns of fewer than 1000 classes."""
    inside = folder / "train" / "ant"
    picture(0, 40, 30).convert("L").save(inside / "ant_0.JPEG")
    picture(0, 40, 30).convert("CMYK").save(inside / "ant_1.JPEG")
    picture(0, 40, 30).save(inside / "ant_2.JPEG", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # says that the image must be turned, which training on ImageNet ignores
    picture(0, 40, 30).save(inside / "ant_3.JPEG", exif=exif)
    train, _ = data.open_dataset(folder, "imagenet", in_memory=0)
    assert "3 classes; ImageNet has 1000" in caplog.text
    grey, *others = (train.load(i) for i in range(4))
    assert grey.shape == (30, 40, 3)
    expected = np.asarray(picture(0, 40, 30), np.float64)
    assert abs(grey - (expected @ augment.GRAY)[..., None]).mean() < 3
    for pixels in others:
        assert abs(pixels - expected).mean() < 3


def test_cifar10_in_either_layout(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = np.arange(60) % 10
    rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(60, -1)], 1)
    for i, name in enumerate((*photos.CIFAR10_TRAIN, *photos.CIFAR10_TEST)):
        (tmp_path / name).write_bytes(rows[10 * i : 10 * i + 10].astype(np.uint8).tobytes())
    for i, (part, label) in enumerate(zip(["train"] * 50 + ["test"] * 10, labels, strict=True)):
        path = tmp_path / "folders" / part / imagesets.CIFAR10_CLASSES[label] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    binary = data.open_dataset(tmp_path, "cifar10")
    folders = data.open_dataset(tmp_path / "folders", "cifar10")
    for one, other, n in zip(binary, folders, (50, 10), strict=True):
        assert one.classes == other.classes
        order = np.argsort(one.labels, kind="stable")
        np.testing.assert_array_equal(one.labels[order], other.labels)
        np.testing.assert_array_equal(one.pixels[order], other.pixels)
        assert len(one) == n


def test_missing_folders_and_classes_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere\. Expected DIR/train/CLASS"):
        data.open_dataset(folder / "nowhere")
    with pytest.raises(ValueError, match=r"dataset='mnist'\. Expected one of imagenet, cifar10"):
        data.open_dataset(folder, "mnist")
    with pytest.raises(FileNotFoundError, match="Expected CIFAR-10 in either layout"):
        data.open_dataset(folder / "val", "cifar10")
    (folder / "val" / "bee").rename(folder / "val" / "wasp")
    with pytest.raises(
        ValueError, match=r"val lacks 1 of the 3 classes of .*train: bee\. Expected"
    ):
        data.open_dataset(folder)
    (folder / "train" / "wasp").mkdir()
    (folder / "train" / "bee").rename(folder / "bee")
    (folder / "val" / "yak").mkdir()
    with pytest.raises(ValueError, match=r"train lacks 1 of the 4 classes of .*val: yak"):
        data.open_dataset(folder)
    (folder / "val").rename(folder / "validation")
    with pytest.raises(FileNotFoundError, match="has no folder val or test"):
        data.open_dataset(folder)
    (folder / "test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no class folders.*folder of its class"):
        data.open_dataset(folder)


def test_a_class_without_images_keeps_its_label(folder, caplog):
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()
    train, _ = data.open_dataset(folder)
    assert "bee holds no image; its class keeps the label" in caplog.text
    assert train.labels.tolist() == [0] * 6 + [2] * 4
    assert train.classes == CLASSES
    for path in folder.glob("train/*/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no image in any class"):
        data.open_dataset(folder)


def test_stripes_need_no_folder():
    train, test = data.stripes(40, 20)
    assert (len(train), len(test), len(train.classes)) == (40, 20, 10)
    assert train.load(3).shape == (32, 32, 3)


# --- Order ---------------------------------------------------------------------------------------


def epochs(count, n=60, seed=0, shuffle="thorough", shards=5):
    positions = np.arange(count * n)
    return shuffling.images_at(positions, n, seed, shuffle, shards).reshape(count, n)


@pytest.mark.parametrize("shuffle", shuffling.SHUFFLES)
def test_an_epoch_has_every_image_once_in_a_new_order(shuffle):
    order = epochs(3, shuffle=shuffle)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(60), (3, 1)))
    assert len({row.tobytes() for row in order}) == 3
    np.testing.assert_array_equal(order, epochs(3, shuffle=shuffle))
    assert (order != epochs(3, shuffle=shuffle, seed=1)).any()


@pytest.mark.parametrize("shuffle", ["within-shard", "fixed-shards"])
def test_shards_keep_their_images_and_come_in_a_new_order(shuffle):
    """Divides 60 images into 5 shards: 12 in a row are always one shard, of any classes."""
    order = epochs(8, shuffle=shuffle).reshape(8, 5, 12)
    shards = {frozenset(shard.tolist()) for epoch in order for shard in epoch}
    assert len(shards) == 5
    assert all(max(shard) - min(shard) > 12 for shard in shards)  # not images in a row
    firsts = {frozenset(epoch[0].tolist()) for epoch in order}
    assert len(firsts) > 1
    uneven = shuffling.shard_members(62, 0, 5)
    assert sorted(map(len, uneven)) == [12, 12, 12, 13, 13]


def met(order, batch):
    """Counts how often two images were in a batch together."""
    pairs = collections.Counter()
    for row in order.reshape(-1, batch):
        pairs.update(itertools.combinations(sorted(row.tolist()), 2))
    return pairs


def test_fixed_shards_bring_the_same_images_together_and_shuffled_ones_do_not():
    """Takes 8 epochs of batches of 4 from shards of 12.

    In fixed shards each of the 60 images meets the same 3 others 8 times. Shuffled within a shard,
    two images of the shard meet in 3 of 11 epochs; shuffled thoroughly, any two meet in 3 of 59.
    """
    fixed, within, thorough = (met(epochs(8, shuffle=s), 4)
                               for s in ("fixed-shards", "within-shard", "thorough"))  # fmt: skip
    assert set(fixed.values()) == {8}
    assert len(fixed) == 60 * 3 / 2
    members = [set(shard.tolist()) for shard in shuffling.shard_members(60, 0, 5)]
    assert all(any({a, b} <= shard for shard in members) for a, b in within)
    possible = 60 * 11 / 2
    assert len(within) > 0.8 * possible  # 1 - (8/11)**8 = 92 % are expected to meet
    assert np.mean(list(within.values())) < 3.5  # 8 * 3/11 / 0.92 = 2.4 expected
    assert len(thorough) > possible
    assert any(not any({a, b} <= shard for shard in members) for a, b in thorough)


# --- Batches to train on -------------------------------------------------------------------------


def test_images_and_labels_of_a_batch_belong_together():
    """Checks that each image is a view of the image that its label belongs to."""
    images = numbered(20)
    batches = data.train_batches(images, batch=7, size=4, seed=0, crop="shift")
    for batch in take(batches, 5):
        assert batch["image"].shape == (7, 4, 4, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 3, batch["label"])
        assert all(type(values) is np.ndarray for values in batch.values())


def test_epochs_follow_without_a_gap():
    batches = data.train_batches(numbered(20), batch=8, size=4, seed=0, crop="shift")
    seen = numbers(batches, 5).reshape(2, 20)
    batches.close()
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(20), (2, 1)))


def test_an_image_looks_different_each_time(folder):
    train, _ = data.open_dataset(folder)
    batches = data.train_batches(train, batch=17, size=16, seed=0)
    first, second = take(batches, 2)
    views = [{v.tobytes() for v in batch["image"]} for batch in (first, second)]
    assert len(views[0] | views[1]) == 34
    other = next(data.train_batches(train, batch=17, size=16, seed=1))
    assert not views[0] & {v.tobytes() for v in other["image"]}


@pytest.mark.parametrize("shuffle", shuffling.SHUFFLES)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count, shuffle):
    train, _ = data.stripes(50, 10)
    wanted = {"size": 32, "seed": 5, "crop": "shift", "distortion": "reduced",
              "shuffle": shuffle, "shards": 4}  # fmt: skip
    whole = take(data.train_batches(train, batch=8, **wanted), 9)
    parts = [take(data.train_batches(train, batch=8 // count, process_index=p,
                                     process_count=count, **wanted), 9)
             for p in range(count)]  # fmt: skip
    for k, batch in enumerate(whole):
        for p in range(count):
            assert_same([{name: v[p::count] for name, v in batch.items()}], [parts[p][k]])


@pytest.mark.parametrize("step", [0, 3, 11])
def test_batches_go_on_from_a_step(step):
    """Makes epochs of 5 batches, so that steps 3 and 11 are in the middle of an epoch."""
    train, _ = data.stripes(40, 10)
    wanted = {"batch": 8, "size": 32, "seed": 2, "crop": "shift", "shuffle": "within-shard",
              "shards": 3}  # fmt: skip
    straight = data.train_batches(train, **wanted)
    for _ in range(step):
        next(straight)
    state = straight.get_state()
    expected = take(straight, 4)
    started = data.train_batches(train, start=step, **wanted)
    assert started.get_state() == state
    assert_same(take(started, 4), expected)
    restored = data.train_batches(train, **wanted)
    next(restored)
    restored.set_state(state)
    assert restored.get_state() == state
    assert_same(take(restored, 4), expected)


def test_batches_start_at_any_step_at_once():
    """Starts a million epochs later, which takes no longer."""
    batches = data.train_batches(
        numbered(20), batch=4, size=4, seed=0, crop="shift", start=5 * 10**6
    )
    assert sorted(numbers(batches, 5).ravel().tolist()) == list(range(20))
    batches.close()


def test_closed_batches_have_ended_until_a_state_is_set():
    batches = data.train_batches(numbered(20), batch=4, size=4, seed=0, crop="shift")
    next(batches)
    batches.close()
    assert list(batches) == []
    batches.set_state({"next": 1})
    assert next(batches)["label"].shape == (4,)
    batches.close()


@pytest.mark.parametrize(("changed", "message"), [
    ({"crop": "random"}, r"crop='random'\. Expected one of resized, shift"),
    ({"distortion": "some"}, r"distortion='some'\. Expected one of full, reduced, none"),
    ({"shuffle": "none"}, r"shuffle='none'\. Expected one of thorough, within-shard"),
    ({"shuffle": "within-shard", "shards": 21}, r"shards=21\. Expected 1 to 20"),
    ({"batch": 0}, r"batch=0\. Expected 1 or more"),
    ({"seed": -1}, r"seed=-1\. Expected 0 or more"),
    ({"workers": -1}, r"workers=-1\. Expected 0, for threads"),
    ({"start": -1}, r"start=-1\. Expected the number of a batch"),
    ({"process_index": 2, "process_count": 2}, r"process_index=2, process_count=2\. Expected"),
    ({"size": 8}, r"images of 4 x 4 pixels\. Expected .* 8 x 8 pixels .* use crop='resized'"),
])  # fmt: skip
def test_wrong_arguments_are_explained(changed, message):
    right = {"batch": 4, "size": 4, "seed": 0, "crop": "shift"}
    with pytest.raises(ValueError, match=message):
        data.train_batches(numbered(20), **{**right, **changed})


def test_images_in_files_are_not_shifted(folder):
    train, _ = data.open_dataset(folder)
    with pytest.raises(ValueError, match="of several sizes, or in files"):
        data.train_batches(train, batch=4, size=32, seed=0, crop="shift")


def test_the_example_in_the_docstring():
    assert doctest.testmod(data).failed == 0


# --- Batches for evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [2, 4, 7])
def test_an_evaluation_has_every_image_once(batch, count):
    images, seen = numbered(20), []
    for p in range(count):
        batches = data.eval_batches(images, batch=batch, size=4, process_index=p,
                                    process_count=count)  # fmt: skip
        mine = list(batches)
        assert len(mine) == batches.length == -(-20 // (batch * count))
        for each in mine:
            assert each["image"].shape == (batch, 4, 4, 3)
            assert each["label"].shape == each["mask"].shape == (batch,)
            shown = each["image"][each["mask"], 0, 0, 0]
            np.testing.assert_array_equal(each["label"][each["mask"]], shown % 3)
            np.testing.assert_array_equal(each["label"][~each["mask"]], -1)
            assert not each["image"][~each["mask"]].any()
            seen += shown.tolist()
    assert sorted(seen) == list(range(20))


def test_evaluation_takes_the_centre_or_144_crops(folder):
    _, val = data.open_dataset(folder)
    with Image.open(val.path(3)) as image:
        centre, all_of_it = augment.centre_crop(image, 16), augment.crops_144(image, 16)
    (batch,) = data.eval_batches(val, batch=6, size=16)
    np.testing.assert_array_equal(batch["image"][3], centre)
    batches = data.eval_batches(val, batch=2, size=16, crops="144")
    np.testing.assert_array_equal(list(batches)[1]["image"][1], all_of_it)
    with pytest.raises(ValueError, match=r"crops='ten'\. Expected one of centre, 144"):
        data.eval_batches(val, batch=6, size=16, crops="ten")


# --- Files that are no images --------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
@pytest.mark.parametrize("damage", [
    truncate,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("<html>404"),
])  # fmt: skip
def test_the_next_of_its_class_takes_the_place_of_a_broken_image(folder, caplog, damage, in_memory):
    # This is the last image of its class, so the first image takes its place.
    damage(folder / "train" / "bee" / "bee_6.JPEG")
    images, _ = data.open_dataset(folder, in_memory=in_memory)
    wanted = {"batch": 17, "size": 16, "seed": 0}
    got = take(data.train_batches(images, **wanted), 2)
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    # A thread of an earlier test may still be running, and warn, too.
    (message,) = [message for message in messages if message.startswith(str(folder))]
    assert "bee_6.JPEG is not a whole image file" in message
    assert "The next of its class takes its place. (Broken files in this process: " in message
    for k, batch in enumerate(got):
        places = np.arange(17 * k, 17 * k + 17)
        order = shuffling.images_at(places, 17, 0, "thorough", 1)
        np.testing.assert_array_equal(batch["label"], images.labels[order])
        row = int(np.flatnonzero(order == 12)[0])
        # The view shows the first image of the class, by the random numbers of this place.
        rng = data.view_rng(0, int(places[row]))
        crop = functools.partial(augment.resized_crop, rng=rng, size=16)
        with pytest.raises(data.BrokenImage):
            images.view(12, crop)
        expected = images.view(6, crop)
        np.testing.assert_array_equal(batch["image"][row], augment.flip(expected, rng))
    assert_same(take(data.train_batches(images, **wanted), 2), got)
    with pytest.raises(data.BrokenImage, match=r"bee_6\.JPEG is not a whole image file"):
        next(data.train_batches(images, strict=True, **wanted))


def test_a_broken_image_is_left_out_of_an_evaluation_and_counted(folder, caplog):
    truncate(folder / "val" / "bee" / "bee_0.JPEG")
    _, val = data.open_dataset(folder, in_memory=0)
    first, second = data.eval_batches(val, batch=4, size=16)
    assert first["mask"].tolist() == [True, True, False, True]
    assert first["label"].tolist() == [0, 0, 1, 1]
    assert second["mask"].tolist() == [True, True, False, False]
    assert second["label"].tolist() == [2, 2, -1, -1]
    assert "bee_0.JPEG is not a whole image file" in caplog.text
    assert "It is left out of the evaluation" in caplog.text
    with pytest.raises(data.BrokenImage, match="bee_0"):
        next(data.eval_batches(val, batch=4, size=16, strict=True))


def test_a_class_of_broken_images_stops_the_run(folder):
    for path in (folder / "train" / "cow").iterdir():
        path.write_bytes(b"")
    for in_memory in (0, 1 << 20):
        images, _ = data.open_dataset(folder, in_memory=in_memory)
        with pytest.raises(data.BrokenImage, match=r"all that it has.*is .*train still there"):
            next(data.train_batches(images, batch=17, size=16, seed=0))


# --- Worker processes ----------------------------------------------------------------------------


def test_workers_make_the_same_batches_and_leave_nothing_behind(folder):
    """Includes a broken file, and compares batches from the start and from a step with threads."""
    truncate(folder / "train" / "bee" / "bee_6.JPEG")
    images, _ = data.open_dataset(folder, in_memory=0)
    wanted = {"batch": 5, "size": 16, "seed": 3, "distortion": "full", "shuffle": "within-shard",
              "shards": 3}  # fmt: skip
    expected = take(data.train_batches(images, **wanted), 9)
    batches = data.train_batches(images, workers=2, **wanted)
    got = [next(batches) for _ in range(5)]
    assert_same(got, expected[:5])
    assert batches.get_state() == {"next": 5}
    batches.set_state({"next": 2})
    assert_same(take(batches, 3), expected[2:5])
    assert all(type(values) is np.ndarray for values in got[0].values())
    assert multiprocessing.active_children() == []
    with pytest.raises(data.BrokenImage, match=r"bee_6\.JPEG is not a whole image file"):
        take(data.train_batches(images, workers=1, strict=True, **wanted), 4)
    assert multiprocessing.active_children() == []


def test_workers_evaluate_in_order(folder):
    _, val = data.open_dataset(folder)
    wanted = {"batch": 2, "size": 16, "process_count": 2, "process_index": 1}
    expected = list(data.eval_batches(val, **wanted))
    assert_same(data.eval_batches(val, workers=2, **wanted), expected)
    assert multiprocessing.active_children() == []
