"""Tests of TFDS labels: hand-computed values including edge cases, and errors."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax.data.decode import decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.tfds import prepare_tfds
from mixer_jax.data.tfds_labels import LabelSpec, get_label_spec, image_fixup, parse_dataset_name
from mixer_jax.errors import DatasetNotPreparedError, UserError
from tests.helpers.fake_vtab import real_features, write_fake_dataset
from tests.helpers.messages import raises

CAR, VAN, TRUCK, PEDESTRIAN, TRAM = 0, 1, 2, 3, 6
SIZES = {
    "clevr": {"train": 4, "test": 2},
    "dsprites": {"train": 4},
    "oxford_iiit_pet": {"train": 4},
    "smallnorb": {"train": 4},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir with small fakes of real datasets."""
    folder = tmp_path_factory.mktemp("copies")
    for name, sizes in SIZES.items():
        write_fake_dataset(name, sizes, folder)
    return str(folder)


def label_spec(name: str) -> LabelSpec:
    return get_label_spec(name, real_features(name, Path("nowhere")))


def coordinates(*distances: float) -> list[np.ndarray]:
    return [np.array([7, 7, distance], np.float32) for distance in distances]


@pytest.mark.parametrize(("name", "parts"), [("cifar10", ("cifar10", None)), ("a@", ("a", ""))])
def test_parse_dataset_name_splits_off_the_label(name: str, parts: tuple[str, str | None]) -> None:
    assert parse_dataset_name(name) == parts
    assert parse_dataset_name("clevr:3.1.0@count_all") == ("clevr:3.1.0", "count_all")


@pytest.mark.parametrize(("count", "expected"), [(3, 0), (4, 1), (10, 7), (0, -1)])
def test_count_all_starts_at_three_objects(count: int, expected: int) -> None:
    label = label_spec("clevr@count_all")
    assert label.extract({"objects": {"size": [1] * count}}) == (expected,)
    if count:
        assert label.class_names[expected] == f"{count} objects"
    assert len(label.class_names) == 8


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([1.0], 0),
        ([8.0], 0),
        ([np.nextafter(np.float32(8), np.float32(9))], 1),
        ([8.5], 1),
        ([8.75], 2),
        ([9.5, 9.0], 2),
        ([12.0, 9.25, 11.0], 3),
        ([9.75], 4),
        ([10.0], 4),
        ([10.25], 5),
        ([99.0], 5),
        ([], -1),
    ],
)
def test_closest_object_distance_bins_the_nearest_object(
    distances: list[float], expected: int
) -> None:
    label = label_spec("clevr@closest_object_distance")
    assert label.extract({"objects": {"pixel_coords": coordinates(*distances)}}) == (expected,)
    assert label.class_names[3] == "9 to 9.5"
    assert len(label.class_names) == 6


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([(CAR, 5.0)], 0),
        ([(CAR, -2.0)], 0),
        ([(VAN, 8.0)], 0),
        ([(VAN, 8.5)], 1),
        ([(TRUCK, 20.0)], 1),
        ([(TRUCK, 20.5)], 2),
        ([(CAR, 90.0)], 2),
        ([(CAR, 30.0), (VAN, 10.0), (TRUCK, 25.0)], 1),
        ([(PEDESTRIAN, 2.0), (CAR, 30.0)], 2),
        ([(PEDESTRIAN, 2.0), (TRAM, 5.0)], 3),
        ([], 3),
    ],
)
def test_closest_vehicle_distance_bins_the_nearest_vehicle(
    objects: list[tuple[int, float]], expected: int
) -> None:
    label = label_spec("kitti@closest_vehicle_distance")
    example = {
        "type": [object_type for object_type, _ in objects],
        "location": coordinates(*(distance for _, distance in objects)),
    }
    assert label.extract({"objects": example}) == (expected,)
    assert label.class_names == ("up to 8 m", "8 to 20 m", "above 20 m", "no vehicle")


def test_vehicle_types_match_tfds() -> None:
    names = real_features("kitti", Path("nowhere"))["objects"].feature["type"].names
    assert names[CAR : TRUCK + 1] == ["Car", "Van", "Truck"]
    assert (names[PEDESTRIAN], names[TRAM]) == ("Pedestrian", "Tram")


@pytest.mark.parametrize(
    ("name", "feature", "sizes"),
    [
        ("dsprites@x_position", "label_x_position", [2] * 16),
        ("dsprites@orientation", "label_orientation", [3, 2] * 8),
    ],
)
def test_dsprites_labels_group_values_into_sixteen_classes(
    name: str, feature: str, sizes: list[int]
) -> None:
    label = label_spec(name)
    values = range(real_features(name, Path("nowhere"))[feature].num_classes)
    classes = [label.extract({feature: np.int64(value)})[0] for value in values]
    assert classes == sorted(classes)
    assert np.bincount(classes).tolist() == sizes
    assert len(set(label.class_names)) == 16


@pytest.mark.parametrize(
    ("name", "class_names"),
    [
        ("smallnorb@label_azimuth", ("0°", "20°", "340°")),
        ("smallnorb@label_elevation", ("30°", "35°", "70°")),
        ("smallnorb@label_category", ("four-legged animals", "human figures", "cars")),
        # The names are part of the download.
        ("cifar100@coarse_label", ("0", "1", "19")),
        ("imagenet2012_real@original_label", ("n01440764", "n01443537", "n15075141")),
    ],
)
def test_any_class_label_can_be_requested(name: str, class_names: tuple[str, ...]) -> None:
    label = label_spec(name)
    feature = real_features(name, Path("nowhere"))[name.split("@")[1]]
    assert len(label.class_names) == feature.num_classes
    assert (*label.class_names[:2], label.class_names[-1]) == class_names
    assert not label.multi_label
    assert label.extract({name.split("@")[1]: np.int64(3)}) == (3,)


VOC_LABEL = tfds.features.ClassLabel(names=["bird", "cat", "dog"])
VOC_LIKE = tfds.features.FeaturesDict(
    {
        "image": tfds.features.Image(),
        "labels": tfds.features.Sequence(VOC_LABEL),
        "objects": tfds.features.Sequence(
            {"label": VOC_LABEL, "area": tfds.features.Scalar(np.int64)}
        ),
    }
)


def test_sequences_of_labels_and_of_objects_are_multi_label() -> None:
    for name in ("my", "my@labels"):
        label = get_label_spec(name, VOC_LIKE)
        assert label.multi_label
        assert label.extract({"labels": np.array([2, 0])}) == (2, 0)
        assert label.extract({"labels": np.zeros(0, np.int64)}) == ()
    label = get_label_spec("my@objects/label", VOC_LIKE)
    assert (label.features, label.multi_label) == ({"objects": ("label",)}, True)
    assert label.class_names == ("bird", "cat", "dog")
    # An image has a class once, whatever the number of its objects.
    assert label.extract({"objects": {"label": np.array([2, 0, 2])}}) == (2, 0)
    with raises(UserError, "my@labels", "my@objects/label", "objects/area"):
        get_label_spec("my@objects/area", VOC_LIKE)


def test_real_label_is_the_default_label() -> None:
    label = label_spec("imagenet2012_real")
    assert label.multi_label
    assert label.extract({"real_label": [5, 7], "original_label": 1}) == (5, 7)
    assert label.extract({"real_label": []}) == ()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "kitti:3.3.0@distance",
            ("kitti:3.3.0", "distance", "kitti:3.3.0@closest_vehicle_distance"),
        ),
        ("cifar100@", ("cifar100", "''", "cifar100@coarse_label", "cifar100@label")),
        (
            "clevr",
            (
                *("clevr", "image", "file_name", "objects", "question_answer"),
                *("clevr@closest_object_distance", "clevr@count_all"),
            ),
        ),
        ("eurosat/all", ("eurosat/all", "sentinel2", "label", "filename", "image")),
        ("eurosat/all@label", ("eurosat/all", "sentinel2", "label", "filename", "image")),
    ],
)
def test_unknown_labels_are_rejected_before_preparation(
    name: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    with raises(UserError, *parts) as caught:
        open_dataset(name, "train", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_error_lists_other_labels_if_the_default_has_no_classes() -> None:
    number, species = tfds.features.Scalar(np.int64), tfds.features.ClassLabel(names=["a", "b"])
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": number, "species": species}
    )
    with raises(UserError, "label", "my@species"):
        get_label_spec("my", features)
    assert get_label_spec("my@species", features).class_names == ("a", "b")


def test_classes_may_be_unknown_before_preparation(tmp_path: Path) -> None:
    assert label_spec("imagenet2012").class_names[0] == "n01440764"
    with raises(DatasetNotPreparedError, "imagenet21k", str(tmp_path)):
        open_dataset("imagenet21k@label", "train", str(tmp_path))


def test_computed_labels_require_the_features() -> None:
    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
    with raises(UserError, "clevr", "image", "label"):
        get_label_spec("clevr@count_all", features)


def test_preparation_ignores_the_label(tmp_path: Path) -> None:
    command = f"python -m mixer_jax.prepare cifar100 --data_dir={tmp_path}"
    with raises(DatasetNotPreparedError, "cifar100", command):
        open_dataset("cifar100@coarse_label", "train", str(tmp_path))
    with raises(UserError, "digits", "absent", "digits@label"):
        prepare_tfds("digits@absent", str(tmp_path))
    assert not list(tmp_path.iterdir())
    prepare_tfds("digits@label", str(tmp_path))
    named, usual = (
        open_dataset(name, "test", str(tmp_path)) for name in ("digits@label", "digits")
    )
    assert [e["labels"] for e in named.examples] == [e["labels"] for e in usual.examples]


@pytest.mark.parametrize("name", ["smallnorb@instance", "oxford_iiit_pet", "clevr@count_all"])
def test_only_required_features_are_decoded(
    name: str, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, example: bytes) -> None:
        raise AssertionError("an unused feature was decoded")

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", fail)
    # Questions of CLEVR and boxes of Pets.
    monkeypatch.setattr(tfds.features.Text, "decode_batch_example_np", fail)
    monkeypatch.setattr(tfds.features.BBoxFeature, "decode_example_np", fail)
    source = open_dataset(name, "train", data_dir)
    assert len(list(source.examples)) == 4


def test_dsprites_images_are_white_on_black(data_dir: str) -> None:
    source = open_dataset("dsprites@label_shape", "train", data_dir)
    images = [decode(example["image"]) for example in source.examples]
    assert {image.shape for image in images} == {(64, 64, 3)}
    assert set(np.unique(images)) == {0, 255}
    whiten = image_fixup("dsprites:2.0.0@orientation")
    assert whiten
    assert whiten(b"broken") == b"broken"
    assert image_fixup("smallnorb@label_azimuth") is None


def test_splits_with_hidden_labels_are_rejected(data_dir: str) -> None:
    for label in ("count_all", "closest_object_distance"):
        with raises(UserError, "test", f"clevr@{label}"):
            open_dataset(f"clevr@{label}", "test", data_dir)


@pytest.mark.parametrize("name", ["clevr@count_all", "dsprites@orientation", "smallnorb@instance"])
def test_sources_can_be_pickled(name: str, data_dir: str) -> None:
    source = open_dataset(name, "train", data_dir)
    unpickled = pickle.loads(pickle.dumps(source))
    assert list(unpickled.examples) == list(source.examples)
