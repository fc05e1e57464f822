"""The order of images in an epoch, and the parts that a data set is split into."""

import dataclasses

import keras
import numpy as np
import pytest

from keras_vit.data import Batches, Dataset, DeviceBatches


def numbered(count=100, classes=4):
    """A data set whose pixels are the index of the image, so that the order can be read."""
    indices = np.arange(count)
    images = np.broadcast_to(indices[:, None, None, None], (count, 4, 4, 3)).astype("uint8")
    names = [f"class {number}" for number in range(classes)]
    return Dataset("numbered", images, indices % classes, images[:8], indices[:8] % 4, names, True)


def read_order(batches):
    return np.concatenate([batches[i][0][:, 0, 0, 0] for i in range(batches.num_batches)])


def test_an_epoch_shows_every_image_once():
    dataset = numbered()
    batches = Batches(dataset.train_images, dataset.train_labels, batch_size=32, seed=0)
    assert [len(batches[i][1]) for i in range(batches.num_batches)] == [32, 32, 32, 4]
    assert sorted(read_order(batches)) == list(range(100))
    images, labels = batches[0]
    assert np.array_equal(images[:, 0, 0, 0] % 4, labels)


def test_the_order_of_images_depends_only_on_seed_and_epoch():
    dataset = numbered()
    arrays = dataset.train_images, dataset.train_labels

    def order(seed, epochs, batch_size=32):
        batches = Batches(*arrays, batch_size, seed)
        for epoch in epochs:
            np.random.seed()
            batches.start_epoch(epoch)
        return read_order(batches)

    third = order(1, [1, 2, 3])
    assert np.array_equal(third, order(1, [3], batch_size=10))
    assert not np.array_equal(third, order(1, [1, 2]))
    assert not np.array_equal(third, order(2, [3]))


def test_held_out_images_are_removed_from_the_training_set():
    dataset = numbered()
    kept, (images, labels) = dataset.hold_out(20, seed=0)
    held, left = set(images[:, 0, 0, 0]), set(kept.train_images[:, 0, 0, 0])
    assert len(held) == 20 and len(left) == 80 and not held & left
    assert np.bincount(labels).tolist() == [5] * 4
    assert np.array_equal(kept.test_images, dataset.test_images)
    _, (again, _) = dataset.hold_out(20, seed=0)
    _, (other, _) = dataset.hold_out(20, seed=1)
    assert np.array_equal(images, again) and not np.array_equal(images, other)


def test_a_limited_training_set_is_stratified():
    limited = numbered().limit_train(40, seed=0)
    assert np.bincount(limited.train_labels).tolist() == [10] * 4
    dataset = numbered()
    for count in (100, 1000):
        full = dataset.limit_train(count, seed=0)
        np.testing.assert_array_equal(full.train_images, dataset.train_images)


@pytest.mark.parametrize("count", [1, 3, 97])
def test_a_split_needs_at_least_as_many_images_as_classes_on_either_side(count):
    with pytest.raises(ValueError, match=rf"images of 4 .*Received: limit_train={count}"):
        numbered().limit_train(count, seed=0)
    with pytest.raises(ValueError, match=rf"images of 4 .*Received: validation={count}"):
        numbered().hold_out(count, seed=0)


def test_no_class_loses_all_of_its_training_images():
    """Such as a rare one, where few images are taken; one without any is not the split's fault."""
    dataset = numbered(classes=2)
    rare = dataclasses.replace(dataset, train_labels=(np.arange(100) >= 98).astype(int))
    with pytest.raises(ValueError, match="Class 'class 1' would .*Received: limit_train=10"):
        rare.limit_train(10, seed=0)
    without = dataclasses.replace(dataset, class_names=["a", "b", "c"])
    kept, (_, labels) = without.hold_out(20, seed=0)
    assert np.bincount(labels).tolist() == [10, 10] and len(kept.train_labels) == 80
    assert len(without.limit_train(20, seed=0).train_labels) == 20


def test_no_more_images_can_be_held_out_than_there_are():
    with pytest.raises(ValueError, match="has 100 training images.*Received: validation=5000"):
        numbered().hold_out(5000, seed=0)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="for JAX alone")
@pytest.mark.parametrize("limit", [0, 2**20], ids=["on the host", "on the device"])
def test_batches_gathered_on_the_device_equal_those_of_the_host(limit, monkeypatch):
    monkeypatch.setattr("keras_vit.data.batches.RESIDENT_BYTES", limit)
    data = numbered()
    pair = [
        kind(data.train_images, data.train_labels, batch_size=16, seed=3)
        for kind in (Batches, DeviceBatches)
    ]
    for batches in pair:
        batches.start_epoch(2)
    assert isinstance(pair[1].images, np.ndarray) == (limit == 0)
    for index in range(pair[0].num_batches):
        for ours, theirs in zip(pair[1][index], pair[0][index], strict=True):
            assert np.array_equal(ours, theirs)
