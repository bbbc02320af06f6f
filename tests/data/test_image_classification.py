"""Images: from Parquet and folders, mixed in training alone, preprocessed as saved."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from table_files import first, write

from d2dmoe_pl.data import Augmentation, DatasetSource, ImageClassification
from d2dmoe_pl.errors import ConfigError

SPLITS = ("train", "validation", "test")


class TestImages:
    def images(self, count=6):
        return [Pillow.fromarray(np.random.randint(0, 255, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]

    def parquet(self, tmp_path):
        features = Features({"picture": Image(), "kind": ClassLabel(names=["cat", "dog"])})
        rows = {"picture": self.images(), "kind": [0, 1, 0, 1, 1, 0]}
        dataset = Dataset.from_dict(rows, features=features)
        return DatasetSource(**{n: write(dataset, tmp_path / f"{n}.parquet") for n in ("train", "validation", "test")})

    def test_parquet_with_class_labels(self, tmp_path):
        data = ImageClassification(
            self.parquet(tmp_path), image_column="picture", label_column="kind", image_size=8, batch_size=4
        )
        data.setup()
        assert data.task.label_names == ["cat", "dog"]
        batch = first(data.val_dataloader())
        assert batch["pixel_values"].shape == (4, 3, 8, 8)
        assert batch["labels"].tolist() == [0, 1, 0, 1]
        assert torch.equal(batch["pixel_values"], first(data.val_dataloader())["pixel_values"])
        data.ordered = True
        assert torch.equal(first(data.train_dataloader())["pixel_values"], batch["pixel_values"])

    def test_image_folder(self, tmp_path):
        for split in ("train", "validation", "test"):
            for i, image in enumerate(self.images()):
                folder = tmp_path / "images" / split / ("cat" if i % 2 else "dog")
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i}.png")
        for where in (
            DatasetSource(str(tmp_path / "images")),
            DatasetSource(**{n: str(tmp_path / "images" / n) for n in ("train", "validation", "test")}),
        ):
            data = ImageClassification(where, image_size=8, batch_size=6)
            data.setup()
            assert data.task.label_names == ["cat", "dog"]
            assert first(data.test_dataloader())["pixel_values"].shape == (6, 3, 8, 8)

    @pytest.mark.parametrize("classes", [("cat", "dog"), ("train", "bus"), ("cat", "test")])
    def test_pictures_and_classes_may_be_called_as_splits_are(self, tmp_path, classes):
        for i, image in enumerate(self.images(12)):
            folder = tmp_path / "im [1]" / classes[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{('train', 'test', 'val')[i % 3]}_{i}.png")
        data = ImageClassification(DatasetSource(**dict.fromkeys(SPLITS, str(tmp_path / "im [1]"))), image_size=8)
        data.setup()
        assert data.task.label_names == sorted(classes)
        assert data.num_training_samples == 12

    def test_the_class_is_the_first_folder_however_deep_a_picture_lies(self, tmp_path):
        for i, image in enumerate(self.images(12)):
            folder = tmp_path / "deep" / ("cat", "dog")[i % 2] / ("2024" if i % 3 else "")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
        data = ImageClassification(DatasetSource(**dict.fromkeys(SPLITS, str(tmp_path / "deep"))), image_size=8)
        data.setup()
        assert data.task.label_names == ["cat", "dog"]
        labels = [label for batch in data.test_dataloader() for label in batch["labels"].tolist()]
        assert labels.count(0) == labels.count(1) == 6
        one = DatasetSource(**dict.fromkeys(SPLITS, str(tmp_path / "deep")) | {"test": str(tmp_path / "one")})
        (tmp_path / "one" / "dog").mkdir(parents=True)
        image.save(tmp_path / "one" / "dog" / "0.png")
        data = ImageClassification(one, image_size=8)
        data.setup()
        assert first(data.test_dataloader())["labels"].tolist() == [1]
        image.save(tmp_path / "one" / "1.png")
        with pytest.raises(ConfigError, match=r"test='.*one': 1.png is in no folder of a class; must be a folder with"):
            ImageClassification(one, image_size=8).setup()
        (tmp_path / "one" / "metadata.csv").write_text("file_name,label\n1.png,cat\ndog/0.png,dog\n")
        data = ImageClassification(one, image_size=8)
        data.setup()
        assert first(data.test_dataloader())["labels"].tolist() == [0, 1]

    def test_labels_are_no_pictures(self, tmp_path):
        data = ImageClassification(self.parquet(tmp_path), "picture", "picture")
        with pytest.raises(ConfigError, match=r"image_column='picture': is the label_column; must be another"):
            data.setup()

    def test_pictures_that_have_come_since_are_found(self, tmp_path):
        rows = {"picture": [f"{i}.png" for i in range(6)], "kind": ["cat", "dog"] * 3}
        file = write(Dataset.from_dict(rows), tmp_path / "own.parquet")
        for images in ([], self.images()):
            for i, image in enumerate(images):
                image.save(tmp_path / f"{i}.png")
            data = ImageClassification(DatasetSource(**dict.fromkeys(SPLITS, file)), "picture", "kind", image_size=8)
            data.setup()
            if not images:
                with pytest.raises(ConfigError, match="cannot be read"):
                    first(data.test_dataloader())
        assert first(data.test_dataloader())["pixel_values"].shape[0] == 6

    def test_only_training_is_mixed_and_only_until_ordered(self, tmp_path):
        mixing = Augmentation(mixup=1.0, cutmix=1.0, label_smoothing=0.1, auto_augment="3a")
        where = self.parquet(tmp_path)
        data = ImageClassification(where, "picture", "kind", image_size=8, batch_size=5, augmentation=mixing)
        data.setup()
        assert data.augmented
        for batch in data.train_dataloader():  # of 5, and of 1
            assert batch["pixel_values"].shape[1:] == (3, 8, 8)
            assert batch["labels"].shape == (len(batch["pixel_values"]), 2)
            torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(len(batch["labels"])))
        assert all(first(loader)["labels"].dim() == 1 for loader in (data.val_dataloader(), data.test_dataloader()))
        data.ordered = True
        assert torch.equal(first(data.train_dataloader())["labels"], first(data.val_dataloader())["labels"])
        plain = ImageClassification(where, "picture", "kind", image_size=8, batch_size=6, augment=False)
        plain.setup()
        assert not plain.augmented
        one, other = (first(plain.train_dataloader())["pixel_values"].sum((1, 2, 3)).tolist() for _ in range(2))
        assert sorted(one) == sorted(other)

    def test_preprocessing_is_saved_and_taken_up(self, tmp_path):
        data = ImageClassification(
            self.parquet(tmp_path), "picture", "kind", image_size=8, mean=[0.1] * 3, std=[0.5] * 3
        )
        data.load_processor()
        data.save_processor(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert (saved["size"], saved["crop_size"]) == ({"shortest_edge": 8}, {"height": 8, "width": 8})
        again = ImageClassification(self.parquet(tmp_path), "picture", "kind", processor=str(tmp_path))
        again.load_processor()
        assert (again.image_size, again.mean, again.std) == (8, [0.1] * 3, [0.5] * 3)

    def test_an_unreachable_processor(self, tmp_path):
        data = ImageClassification(self.parquet(tmp_path), "picture", "kind", processor="nobody/nothing")
        with pytest.raises(ConfigError, match="processor='nobody/nothing': neither a folder nor a reachable hub name"):
            data.load_processor()
