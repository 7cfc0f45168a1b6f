"""Episodes: disjoint, seeded, refused where there are too few images; augmentation; prototypes as a head."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pyrolora.guides import BLoB, MeanField
from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LabelLoRA, LastLayer, LoRA
from pyrolora.models.program import BayesianModel
from pyrolora.models.prototypes import class_prototypes, prototype_logits
from pyrolora.models.tasks import EpisodeClasses, episodic, task
from pyrolora.models.tasks.augmentation import Augmentation


@pytest.fixture
def source(three_shapes):
    return three_shapes(train=30, validation=9, test=9)


@pytest.fixture
def episodes(source):
    return episodic(source, ways=2, shots=3, queries=4, counts=(6, 3, 5))


@pytest.fixture
def encoded(episodes, tiny_vision):
    return tiny_vision().encode(episodes.train, episodes.format, 0)


class TestDrawing:
    def test_shots_and_queries_are_disjoint_images_of_one_class_each(self, encoded):
        for number in range(20):
            support, queries = encoded.episode(number)
            assert support.shape == (2, 3)
            assert queries.shape == (2, 4)
            everything = [*support.flatten(), *queries.flatten()]
            assert len(set(everything)) == len(everything)
            classes = encoded.classes_of[torch.tensor(everything)]
            rows = torch.cat([classes[:6].view(2, 3), classes[6:].view(2, 4)], dim=1)
            assert (rows == rows[:, :1]).all()
            assert rows[0, 0] != rows[1, 0]

    def test_the_number_and_the_seed_decide_an_episode(self, source, tiny_vision):
        one, again, other = (
            tiny_vision().encode(made.train, made.format, 0)
            for made in (episodic(source, ways=2, queries=4, seed=seed) for seed in (0, 0, 1))
        )
        assert all((one.episode(number)[1] == again.episode(number)[1]).all() for number in range(5))
        assert any((one.episode(number)[1] != other.episode(number)[1]).any() for number in range(5))
        assert (one.episode(0)[1] != one.episode(1)[1]).any()

    def test_splits_have_episodes_of_their_own_and_classes_too_if_asked(self, source):
        made = episodic(source, ways=2, queries=4)
        assert len({made.train.seed, made.validation.seed, made.test.seed}) == 3
        with pytest.raises(ValueError, match="three_shapes train has 0 classes, and an episode takes 2"):
            episodic(source, ways=2, queries=4, held_out=0.3)

    def test_held_out_classes_are_disjoint(self):
        made = episodic(task("digits"), ways=3, queries=4, held_out=0.3)
        classes = [{example.label for example in split.examples} for split in (made.train, made.validation, made.test)]
        assert [len(one) for one in classes] == [4, 3, 3]
        assert len(set.union(*classes)) == 10

    def test_batches_are_whole_episodes_and_every_query_comes_once(self, encoded):
        assert len(encoded) == 48
        seen = []
        for batch in encoded.batches(16):
            assert batch["support"].shape[1:] == (6, 1, 16, 16)
            assert batch["support_labels"].tolist() == [[0, 0, 0, 1, 1, 1]] * len(batch["support"])
            assert batch["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * len(batch["support"])
            assert 0 <= batch["pixel_values"].min() <= batch["pixel_values"].max() <= 1
            seen += batch["index"].tolist()
        assert sorted(seen) == list(range(48))
        assert encoded.steps_per_epoch(16) == 3
        assert encoded.steps_per_epoch(1) == 6

    def test_a_stream_goes_on_from_any_step(self, encoded):
        whole, late = encoded.stream(1, seed=0), encoded.stream(1, seed=0, start=7)
        for _ in range(7):
            next(whole)
        assert torch.equal(next(whole)["pixel_values"], next(late)["pixel_values"])

    def test_images_that_do_not_fit_in_memory_are_the_same(self, encoded, monkeypatch, tiny_vision, episodes):
        monkeypatch.setattr("pyrolora.models.tasks.episodes.KEPT_BYTES", 10)
        slow = tiny_vision().encode(episodes.train, episodes.format, 0)
        positions = list(range(8))
        assert all(torch.equal(value, slow.batch(positions)[name]) for name, value in encoded.batch(positions).items())

    def test_a_name_asks_for_episodes(self):
        named = task("digits:3w2s4q")
        assert (named.format.ways, named.format.shots, named.format.queries) == (3, 2, 4)
        assert named.name == "digits:3w2s4q"
        assert task("digits:5w1s").name == "digits:5w1s15q"

    def test_a_subset_is_fewer_episodes(self, episodes):
        assert len(episodes.test.subset(17)) == 16
        assert episodes.test.subset(16).seed == episodes.test.seed
        assert episodes.test.subset(16, seed=1).seed != episodes.test.seed
        with pytest.raises(ValueError, match="ask for 8 to 40"):
            episodes.test.subset(5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"ways": 1}, "ways of at least 2; got 1"),
            ({"ways": 2.5}, "'ways' of EpisodeClasses is a whole number; got 2.5"),
            ({"ways": 4, "queries": 4}, "has 3 classes, and an episode takes 4"),
            ({"ways": 2, "shots": 10}, "16 images of the class 0, and an episode takes 10 shots and 15 queries"),
            ({"ways": 2, "shots": 0}, "shots of at least 1"),
            ({"ways": 2, "queries": 4, "held_out": 0.6}, r"in \[0, 0.5\)"),
            ({"ways": 2, "queries": 4, "counts": (1, 0, 1)}, "at least one episode"),
        ],
    )
    def test_bad_settings(self, source, settings, reason):
        with pytest.raises(ValueError, match=reason):
            episodic(source, **settings)

    def test_texts(self, three_topics):
        with pytest.raises(ValueError, match="is asked as label; episodes are drawn from images"):
            episodic(three_topics())

    def test_part_of_an_episode(self, encoded):
        with pytest.raises(ValueError, match="whole episodes of 8 queries"):
            encoded.batch([0, 1, 2])

    def test_other_shapes_and_plain_images(self, episodes, source, tiny_vision):
        with pytest.raises(ValueError, match="2 classes and 8 queries, and the model's have 2 and 4"):
            tiny_vision().encode(episodes.train, EpisodeClasses(2, 1, 2), 0)
        with pytest.raises(ValueError, match="Name the task 'three_shapes:2w3s', or make it with episodic"):
            tiny_vision().encode(source.train, episodes.format, 0)
        given = replace(source.train, task="three_shapes:2w3s4q")
        with pytest.raises(
            ValueError, match=r"no split of episodes\. Single images cannot be classified without labelled ones"
        ):
            tiny_vision().encode(given, episodes.format, 0)

    def test_a_last_layer(self, episodes, tiny_vision):
        with pytest.raises(ValueError, match="other ones in every episode"):
            BayesianModel(tiny_vision(), episodes, adapter=[LoRA(rank=2), LastLayer()])
        with pytest.raises(ValueError, match=r"LabelLoRA\(\) has a row for each class"):
            BayesianModel(tiny_vision(), episodes, adapter=[LoRA(rank=2), LabelLoRA(rank=2)])

    def test_curvature(self, episodes, tiny_vision):
        model = BayesianModel(tiny_vision(), episodes, adapter=LoRA(rank=2))
        with pytest.raises(ValueError, match="in episodes no site is"):
            Laplace(structure="diag", estimate=MAP(steps=1)).fit(model, episodes.train, progress=False)


class TestPrototypes:
    def test_logits_are_scaled_cosines_with_class_means(self):
        support, queries = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
        labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 0, 1]])
        found = prototype_logits(queries, support, labels, 3, scale=7.0, bias=0.5)
        for episode in range(2):
            for way in range(3):
                mean = support[episode][labels[episode] == way].mean(0)
                expected = 7 * (functional.cosine_similarity(queries[episode], mean[None]) + 0.5)
                torch.testing.assert_close(found[episode, :, way], expected)
        assert class_prototypes(support, labels, 3).shape == (2, 3, 5)

    def test_the_head_is_that_on_the_networks_features_episode_by_episode(self, episodes, tiny_vision):
        backbone = tiny_vision(torch.float64)
        model = BayesianModel(backbone, episodes, adapter=LoRA(rank=2))
        batch = model.encode(episodes.train).batch(list(range(16)))
        draw = {name: 0.3 * torch.randn(3, *site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        found = model.logits(batch, draw)
        assert found.shape == (3, 16, 2)
        for number in range(3):
            one = {name: value[number] for name, value in draw.items()}
            backbone.bind(model.deltas(one))
            for episode in range(2):
                support = backbone.features({"pixel_values": batch["support"][episode].double()})
                rows = slice(8 * episode, 8 * episode + 8)
                queries = backbone.features({"pixel_values": batch["pixel_values"][rows].double()})
                expected = prototype_logits(queries, support, batch["support_labels"][episode], 2)
                torch.testing.assert_close(found[number, rows], expected, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("given", [[0, 0, 0, 0, 0, 0], [7, 7, 7, 7, 7, 7], [0, 0, 0, 1, 1, 2]])
    def test_classes_without_an_example_and_examples_without_a_class(self, episodes, tiny_vision, given):
        model = BayesianModel(tiny_vision(), episodes, adapter=LoRA(rank=2))
        batch = model.encode(episodes.train).batch(list(range(16)))
        batch["support_labels"] = torch.tensor([[0, 0, 0, 1, 1, 1], given])
        with pytest.raises(ValueError, match="expected each of 0 to 1 in every episode, and no other"):
            model.row_logits(batch, model.initial())

    def test_labelled_images_of_another_size(self, episodes, tiny_vision):
        model = BayesianModel(tiny_vision(), episodes, adapter=LoRA(rank=2))
        batch = model.encode(episodes.train).batch(list(range(8)))
        batch["support"] = batch["support"][..., :8, :8]
        with pytest.raises(ValueError, match=r"The labelled images are \(1, 8, 8\) and the queries \(1, 16, 16\)"):
            model.row_logits(batch, model.initial())

    @pytest.mark.parametrize("noise", ["weight", "example"])
    def test_engines_and_posteriors_take_episodes_as_any_data(self, episodes, tiny_vision, tmp_path, noise):
        model = BayesianModel(tiny_vision(), episodes, adapter=LoRA(rank=2))
        for guide in (BLoB(), MeanField()):
            posterior = SVI(guide=guide, steps=2, noise=noise, batch_size=16).fit(model, episodes.train, progress=False)
            predictive = posterior.predict(episodes.test, draws=3, generator=torch.Generator().manual_seed(0))
            assert predictive.probs.shape == (3, 40, 2)
            again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / noise), model=model)
            assert torch.equal(
                again.predict(episodes.test, draws=3, generator=torch.Generator().manual_seed(0)).probs,
                predictive.probs,
            )
            assert posterior.kinds == ("mc", "mean")


class TestAugmentation:
    @pytest.fixture
    def images(self):
        return torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def test_images_stay_images_and_the_seed_decides(self, images):
        first, again, other = (Augmentation()(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert 0 <= first.min() <= first.max() <= 1
        # 400 images, each left alone with a probability of 0.1: within 4.5 standard deviations of 40
        alone = (first == images).flatten(1).all(1).sum()
        assert 13 <= alone <= 67

    def test_every_change_can_be_alone(self, images):
        source = torch.Generator().manual_seed(0)
        flips = Augmentation(colour=False, translation=0.0, probability=1.0)(images, source)
        flipped, same = (flips == images.flip(-1)).flatten(1).all(1), (flips == images).flatten(1).all(1)
        assert (flipped ^ same).all()
        assert 155 <= flipped.sum() <= 245
        coloured = Augmentation(flip=False, translation=0.0, probability=1.0)(images, source)
        assert not torch.equal(coloured, images)
        assert torch.equal(Augmentation(probability=0.0)(images, source), images)

    def test_shifts_are_whole_pixels_with_black_behind_them(self, images):
        shifted = Augmentation(flip=False, colour=False, translation=0.125, probability=1.0)(images)
        found = set()
        for image, moved in zip(images[:, 0], shifted[:, 0], strict=True):
            padded = functional.pad(image, (2, 2, 2, 2))
            matches = [
                (down - 2, right - 2)
                for down in range(5)
                for right in range(5)
                if torch.equal(padded[down : down + 16, right : right + 16], moved)
            ]
            assert len(matches) == 1
            found.add(matches[0])
        # 25 shifts, 400 images: one is missing with a probability below 25 (24 / 25)^400 = 2e-6
        assert len(found) == 25

    def test_leading_dimensions_are_images(self, images):
        flat, nested = (
            Augmentation()(images.view(*shape, 1, 16, 16), torch.Generator().manual_seed(0))
            for shape in ((400,), (20, 20))
        )
        assert torch.equal(flat, nested.view(400, 1, 16, 16))

    @pytest.mark.parametrize("settings", [{"translation": 1.0}, {"translation": -0.1}, {"probability": 1.5}])
    def test_bad_settings_are_refused(self, settings):
        with pytest.raises(ValueError, match=r"in \[0, 1"):
            Augmentation(**settings)
