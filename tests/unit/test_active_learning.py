"""Active learning; oracles: scores by hand on a posterior whose probabilities are known, and uninterrupted runs."""

import json
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from pyrolora.inference.active_learning import LearningCurve, Round, active_learning, learning_curves
from pyrolora.inference.evaluation import mutual_information, predictive_entropy
from pyrolora.inference.map import MAP
from pyrolora.inference.predictive import Predictive
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LoRA

SIZES = {"start": 6, "ask": 4, "rounds": 3}


class Known:
    """An engine and its posterior: the probabilities of an example depend on its id alone."""

    def __init__(self):
        self.fits = []

    def fit(self, model, data, *, progress=True, generator=None):
        self.fits.append([example.id for example in data])
        return self

    def predict(self, data, *, draws=10, kind=None, generator=None, batch_size=32, progress=False):
        probs = torch.stack([self.probs(example.id, draws) for example in data], 1)
        return Predictive(probs, "mc", torch.tensor([example.label for example in data]))

    def probs(self, name, draws):
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(draws, 3, generator=generator).mul(2).softmax(-1)


@pytest.fixture
def task(three_topics):
    return three_topics(train=40)


@pytest.mark.parametrize(("name", "score"), [("bald", mutual_information), ("entropy", predictive_entropy)])
def test_the_most_telling_examples_are_asked_for(task, name, score):
    engine = Known()
    _, curve = active_learning(engine, None, task.train, task.test, acquisition=name, progress=False, **SIZES)
    assert [one.labelled for one in curve.rounds] == [6, 10, 14]
    assert [len(fit) for fit in engine.fits] == [6, 10, 14]
    for before, after, one in zip(engine.fits, engine.fits[1:], curve.rounds, strict=False):
        rest = [example.id for example in task.train if example.id not in before]
        scores = score(torch.stack([engine.probs(i, 10) for i in rest], 1))
        expected = {rest[int(place)] for place in scores.topk(4).indices}
        assert set(one.asked) == expected == set(after) - set(before)
    assert curve.rounds[-1].asked == ()
    labels = torch.tensor([example.label for example in task.test])
    predicted = engine.predict(task.test).mean_probs.argmax(1)
    assert curve.rounds[0].accuracy == pytest.approx(float((predicted == labels).double().mean()))


def test_all_acquisitions_start_alike_and_random_differs_by_seed(task):
    engines = [Known() for _ in range(4)]
    curves = [
        active_learning(engine, None, task.train, task.test, acquisition=name, seed=seed, progress=False, **SIZES)[1]
        for engine, (name, seed) in zip(
            engines, [("bald", 0), ("random", 0), ("random", 0), ("random", 1)], strict=True
        )
    ]
    assert engines[0].fits[0] == engines[1].fits[0]
    assert curves[1] == curves[2]
    assert curves[1].rounds[0].asked != curves[3].rounds[0].asked
    # stratified: three classes, two of each
    classes = {example.id: example.label for example in task.train}
    assert sorted(classes[i] for i in engines[0].fits[0]) == [0, 0, 1, 1, 2, 2]


def test_equal_scores_are_asked_in_random_order(task):
    def nothing(probs):
        return torch.zeros(probs.shape[1])

    asked = [
        active_learning(Known(), None, task.train, task.test, acquisition=nothing, seed=s, progress=False, **SIZES)[1]
        for s in (0, 1)
    ]
    assert asked[0].acquisition == "nothing"
    assert asked[0].rounds[0].asked != asked[1].rounds[0].asked


def test_a_stopped_run_goes_on_to_the_same_curve(task, tmp_path):
    whole = active_learning(Known(), None, task.train, task.test, progress=False, **SIZES)[1]

    class Stops(Known):
        def fit(self, *args, **kwargs):
            if len(self.fits) == 2:
                raise KeyboardInterrupt
            return super().fit(*args, **kwargs)

    file = tmp_path / "deep" / "curve.json"
    with pytest.raises(KeyboardInterrupt):
        active_learning(Stops(), None, task.train, task.test, checkpoint=file, progress=False, **SIZES)
    assert len(LearningCurve.load(file).rounds) == 2
    engine = Known()
    _, resumed = active_learning(engine, None, task.train, task.test, checkpoint=file, progress=False, **SIZES)
    assert resumed == whole == LearningCurve.load(file)
    assert len(engine.fits) == 1, "finished rounds are not fitted again"
    posterior, again = active_learning(engine, None, task.train, task.test, checkpoint=file, progress=False, **SIZES)
    assert again == whole
    assert posterior is engine
    assert [path.name for path in file.parent.iterdir()] == ["curve.json"]
    with pytest.raises(ValueError, match="holds 3 rounds of 'bald' under seed 0, and now 'entropy'"):
        active_learning(Known(), None, task.train, task.test, acquisition="entropy", checkpoint=file, **SIZES)
    with pytest.raises(ValueError, match="with other numbers"):
        active_learning(Known(), None, task.train, task.test, checkpoint=file, start=6, ask=5, rounds=3)
    file.write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="no learning curve of this version"):
        LearningCurve.load(file)


def test_real_engines_on_a_tiny_llama(three_topics_model, task):
    model = three_topics_model(torch.float32, LoRA(rank=1, layers=(2,)), dist.Normal(0.0, 0.2), task=task)
    engine = SVI(steps=2, batch_size=4)
    first = active_learning(engine, model, task.train, task.test, draws=3, progress=False, **SIZES)
    second = active_learning(engine, model, task.train, task.test, draws=3, progress=False, **SIZES)
    assert first[1] == second[1]
    assert first[0].record["num_data"] == 14, "the likelihood is scaled to the labels at hand"
    with pytest.raises(ValueError, match="mutual information of a single draw is zero"):
        active_learning(MAP(steps=1, batch_size=4), model, task.train, task.test, progress=False, **SIZES)
    active_learning(
        MAP(steps=1, batch_size=4), model, task.train, task.test, acquisition="entropy", progress=False, **SIZES
    )


def test_area_and_picture():
    rounds = (Round(10, ("a",), 0.5, 1.0), Round(20, ("b",), 0.7, 0.8), Round(40, (), 0.8, 0.6))
    curve = LearningCurve("bald", 0, rounds)
    assert curve.area == pytest.approx((10 * 0.6 + 20 * 0.75) / 30)
    assert replace(curve, rounds=rounds[:1]).area == 0.5
    figure, axes = learning_curves([curve, replace(curve, seed=1), replace(curve, acquisition="random")])
    assert isinstance(figure, Figure)
    assert [line.get_label() for line in axes.lines] == ["bald", "random"]
    with pytest.raises(ValueError, match="got none"):
        learning_curves([])
    with pytest.raises(ValueError, match="other numbers of labels"):
        learning_curves([curve, replace(curve, rounds=rounds[:2])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acquisition": "bold"}, "Did you mean 'bald'"),
        ({"ask": 0}, "ask is a whole number of at least 1; got 0"),
        ({"rounds": 20}, "20 rounds need 82 examples"),
        ({"acquisition": lambda probs: torch.ones(2)}, "one finite number each"),
        ({"acquisition": lambda probs: torch.full((probs.shape[1],), torch.nan)}, "one finite number each"),
    ],
)
def test_bad_input(task, changes, message):
    with pytest.raises(ValueError, match=message):
        active_learning(Known(), None, task.train, task.test, progress=False, **(SIZES | changes))
    anonymous = replace(task.train, examples=tuple(replace(example, id="") for example in task.train))
    with pytest.raises(ValueError, match="share an id"):
        active_learning(Known(), None, anonymous, task.test, progress=False, **SIZES)
