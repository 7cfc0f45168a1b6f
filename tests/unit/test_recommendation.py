"""Interactions, windows, the sequence encoder, prepared folders as tasks, hybrid prompts and generated answers."""

import csv
import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pyrolora.cli import app
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import ItemProjector, LoRA, MixtureLoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.loading import load_backbone
from pyrolora.models.prior_declarations import Flat
from pyrolora.models.program import BayesianModel
from pyrolora.models.recommendation import Preparation, SASRec, fit_sasrec, read_interactions, windows_of
from pyrolora.models.recommendation.generation import count_answers, generate_answers
from pyrolora.models.recommendation.hybrid import HybridScoring
from pyrolora.models.recommendation.item_network import fit_item_network, item_tokenizer, save_item_network
from pyrolora.models.recommendation.preparation import read_windows
from pyrolora.models.recommendation.sasrec import PADDING, left_padded
from pyrolora.models.recommendation.windows import Window
from pyrolora.models.tasks import task

ITEMS, USERS, TAKEN = 40, 24, 16


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Users who take items in one of two fixed rounds, so that the next item can be learnt."""
    random = np.random.default_rng(0)
    rounds = [random.permutation(ITEMS), random.permutation(ITEMS)]
    path = tmp_path_factory.mktemp("log") / "visits.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp", "title", "rating"])
        for user in range(USERS):
            start = int(random.integers(ITEMS))
            events = [(place, int(rounds[user % 2][(start + place) % ITEMS])) for place in range(TAKEN)]
            for place, item in reversed(events):
                writer.writerow([f"u{user}", f"n{item}", place, f"Title {item}", 5])
            # what somebody disliked is no part of their history
            writer.writerow([f"u{user}", "n3", TAKEN + 1, "Title 3", 1])
    return path


@pytest.fixture(scope="module")
def interactions(log):
    return read_interactions(log)


@pytest.fixture(scope="module")
def folder(interactions, tmp_path_factory):
    where = tmp_path_factory.mktemp("prepared") / "windows"
    preparation = Preparation(features=8, epochs=2, train_windows=30, history=6, candidates=20)
    return preparation.prepare(interactions, where, progress=False)


@pytest.fixture(scope="module")
def item_backbone(interactions):
    windows = windows_of(interactions, list(interactions.of_user)[:12], history=6)
    return fit_item_network(windows, len(interactions.titles), hidden=32, layers=2, epochs=1, progress=False)


class TestInteractions:
    def test_items_are_ordered_by_time_and_dislikes_left_out(self, interactions):
        assert len(interactions.of_user) == USERS
        assert len(interactions) == USERS * TAKEN
        assert all(len(items) == TAKEN for items in interactions.of_user.values())
        first = interactions.of_user["u0"]
        again = interactions.of_user["u2"]
        # two users of one round: where one item follows another for both, it is the same one
        follows = dict(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
        shared = [(a, b) for a, b in zip(again[:-1].tolist(), again[1:].tolist(), strict=True) if a in follows]
        assert all(follows[a] == b for a, b in shared)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("user,item\na,b\n", "Row 1 of x.csv has no column 'timestamp'"),
            ("user,item,timestamp\na,b,noon\n", "has the timestamp 'noon', expected a number"),
            ("user,item,timestamp\na,b,1\na,c,nan\n", "Row 2 of x.csv has the timestamp 'nan', expected a number"),
            ("user,item,timestamp,rating\na,b,1,NaN\n", "Row 1 of x.csv has the rating 'NaN', expected a number"),
            ("user,item,timestamp\na,b,inf\n", "has the timestamp 'inf', expected a number"),
            ("user,item,timestamp,rating\na,b,1,1\n", "No interaction is left of 1 rows"),
        ],
    )
    def test_bad_rows(self, tmp_path, text, message):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_interactions(tmp_path / "x.csv")

    def test_a_byte_order_mark_is_no_part_of_a_column(self, log, tmp_path, interactions):
        (tmp_path / "marked.csv").write_text(log.read_text(), encoding="utf-8-sig")
        found = read_interactions(tmp_path / "marked.csv")
        assert found.titles == interactions.titles
        assert {user: items.tolist() for user, items in found.of_user.items()} == {
            user: items.tolist() for user, items in interactions.of_user.items()
        }

    def test_a_missing_file(self, log):
        with pytest.raises(FileNotFoundError, match=r"Did you mean 'visits\.csv'"):
            read_interactions(log.with_name("visit.csv"))

    @pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="the package recbole is not installed")
    def test_movielens(self):
        # a count taken from the file itself: ratings of 3 and more
        found = read_interactions("movielens-100k")
        assert (len(found), len(found.of_user)) == (82_520, 943)
        assert "The English Patient (1996)" in found.titles


class TestWindows:
    def test_the_target_is_there_once_and_nothing_of_the_past(self, interactions):
        made = windows_of(interactions, list(interactions.of_user), history=5)
        assert len(made) == USERS * (TAKEN - 5)
        for window in made:
            past = interactions.of_user[window.user][: window.position].tolist()
            assert list(window.history) == past[-5:]
            assert window.target == interactions.of_user[window.user][window.position]
            assert len(set(window.candidates)) == 20
            assert window.candidates.count(window.target) == 1
            assert not set(window.candidates) & set(past)
            assert window.candidates[window.label] == window.target
        # the target stands anywhere: 264 places of 20, each expected 13 times; all of them occur but for chance 1e-4
        assert {window.label for window in made} == set(range(20))

    def test_candidates_depend_on_seed_user_and_position_alone(self, interactions):
        users = list(interactions.of_user)
        whole = windows_of(interactions, users, history=5)
        last = windows_of(interactions, users[::-1], history=5, last_only=True)
        assert len(last) == USERS
        assert all(window in whole for window in last)
        assert windows_of(interactions, users, history=5, seed=1)[0].candidates != whole[0].candidates

    def test_short_histories(self, interactions):
        with pytest.raises(ValueError, match="has 16 items, and a window takes 16 and a next one"):
            windows_of(interactions, ["u0"], history=16)
        shorter = windows_of(interactions, ["u0"], history=10, shortest=3)
        assert [len(window.history) for window in shorter] == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10, 10]

    def test_bad_input(self, interactions):
        with pytest.raises(ValueError, match="There is no user 'nobody'"):
            windows_of(interactions, ["nobody"])
        with pytest.raises(ValueError, match="only 29 items are new"):
            windows_of(interactions, ["u0"], history=10, candidates=35, last_only=False)
        with pytest.raises(ValueError, match="hold the target 0 times, expected once"):
            Window("a", 3, (1, 2), 3, (4, 5))
        with pytest.raises(ValueError, match="hold the target 2 times"):
            Window("a", 3, (1, 2), 3, (3, 3))
        with pytest.raises(ValueError, match=r"hold items of the history: \[2\]"):
            Window("a", 3, (1, 2), 3, (2, 3))


class TestSASRec:
    def test_a_state_sees_the_past_only_and_no_padding(self):
        model = SASRec(20, features=8, length=6).eval()
        items = torch.tensor([[3, 1, 4, 15, 9, 2]])
        whole = model(items)
        changed = model(torch.cat([items[:, :4], torch.tensor([[7, 8]])], 1))
        torch.testing.assert_close(changed[:, :4], whole[:, :4], atol=1e-6, rtol=0)
        assert (changed[:, 4:] - whole[:, 4:]).abs().max() > 1e-3
        short = left_padded([[9, 2]], 6, 20)
        assert short.tolist() == [[PADDING] * 4 + [9, 2]]
        before = model(short)[0, -1]
        with torch.no_grad():
            model.item_embeddings.weight[-1] = 5.0
        torch.testing.assert_close(model(short)[0, -1], before, atol=1e-6, rtol=0)

    def test_it_learns_what_comes_next_and_is_the_same_for_a_seed(self, interactions, tmp_path):
        sequences = [items.tolist() for items in interactions.of_user.values()]
        settings = {"features": 16, "length": 6, "epochs": 40, "batch_size": 16, "progress": False}
        model = fit_sasrec(sequences, len(interactions.titles), **settings)
        last = windows_of(interactions, list(interactions.of_user), history=6, last_only=True)
        scores = model.scores(model.states([window.history for window in last]))
        chosen = scores.gather(1, torch.tensor([window.candidates for window in last])).argmax(1)
        # the rounds are deterministic: chance is 0.05
        assert (chosen == torch.tensor([window.label for window in last])).float().mean() > 0.6
        model.save(tmp_path / "sasrec.safetensors")
        loaded = SASRec.load(tmp_path / "sasrec.safetensors")
        assert torch.equal(loaded.states([[1, 2, 3]]), model.states([[1, 2, 3]]))
        short = {**settings, "epochs": 1}
        twice = [fit_sasrec(sequences, len(interactions.titles), **short).positions.weight for _ in range(2)]
        assert torch.equal(*twice)

    def test_bad_histories(self):
        model = SASRec(20, features=8, length=6)
        with pytest.raises(ValueError, match="History 1 is empty"):
            model.states([[1], []])
        with pytest.raises(ValueError, match="History 0 holds an item outside 0 to 19"):
            model.states([[20]])


class TestPreparedFolder:
    def test_users_are_divided_and_unusual_ones_apart(self, interactions):
        parts = Preparation(history=6).divide(interactions)
        everyone = [user for users in parts.values() for user in users]
        assert sorted(everyone) == sorted(interactions.of_user)
        assert {part: len(users) for part, users in parts.items()} == {
            "train": 18, "validation": 2, "test": 2, "unusual": 2,
        }  # fmt: skip

    def test_it_is_a_task(self, folder, interactions):
        data = task("next_item", data_dir=folder)
        assert len(data.train) == 30
        example = data.test.examples[0]
        assert example.options[example.label].startswith("Title ")
        assert example.fields["history"].count("\n") == 5
        assert not set(example.fields["history"].split("\n")) & set(example.options)
        encoder = SASRec.load(folder / "sasrec.safetensors")
        history = example.vectors["history_items"].tolist()
        torch.testing.assert_close(example.vectors["sequence"], encoder.states([history])[0], atol=1e-6, rtol=0)
        assert torch.equal(data.tables["items"], encoder.item_embeddings.weight[:-1])
        unusual = task("next_item_unusual", data_dir=folder)
        users = [{one.id.split("/")[0] for one in split} for split in (data.train, data.test, unusual.test)]
        assert not users[0] & users[1]
        assert not (users[0] | users[1]) & users[2]

    def test_bad_folders(self, folder, tmp_path, interactions):
        with pytest.raises(FileNotFoundError, match="pyrolora windows movielens-100k --out"):
            task("next_item", data_dir=tmp_path)
        (tmp_path / "mine.txt").write_text("keep me")
        with pytest.raises(FileExistsError, match="holds no prepared windows"):
            Preparation(history=6).prepare(interactions, tmp_path, progress=False)
        broken = tmp_path / "broken"
        broken.mkdir()
        for path in folder.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        lines = (broken / "test.jsonl").read_text().splitlines()
        row = json.loads(lines[0])
        for change, message in (
            ({"label": 20}, "The target must be among the candidates, exactly once"),
            ({"history": []}, "has an empty history"),
            ({"history": row["candidates"][:2]}, "has candidates of the history"),
            ({"history": [999]}, "has the item 999"),
        ):
            (broken / "test.jsonl").write_text("\n".join([json.dumps({**row, **change}), *lines[1:]]))
            with pytest.raises(ValueError, match=message):
                task("next_item", data_dir=broken)
        (broken / "test.jsonl").write_text(lines[0])
        with pytest.raises(ValueError, match="the folder was changed by hand"):
            task("next_item", data_dir=broken)

    def test_too_few_users(self, log, tmp_path):
        few = tmp_path / "few.csv"
        few.write_text("\n".join(log.read_text().splitlines()[:40]))
        with pytest.raises(ValueError, match="at least 10 are needed"):
            Preparation(history=6).prepare(read_interactions(few), tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_the_command_line(self, log, tmp_path):
        arguments = ["windows", str(log), "--out", str(tmp_path / "made"), "--history", "6", "--epochs", "1", "--quiet"]
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 0, outcome.output
        assert "--task next_item --data-dir" in outcome.output
        assert "--set max_length=600" in outcome.output
        assert (tmp_path / "made" / "items.json").is_file()
        outcome = CliRunner().invoke(app, [*arguments, "--shortest", "4"])
        assert outcome.exit_code == 0, outcome.output
        lengths = {len(window.history) for window in read_windows(tmp_path / "made", "train")}
        assert lengths == {4, 5, 6}
        for epochs in ("0", "-1"):
            outcome = CliRunner().invoke(app, [*arguments, "--epochs", epochs])
            assert outcome.exit_code == 2
            assert f"at least 1 epoch to learn anything; got {epochs}" in outcome.output
        outcome = CliRunner().invoke(app, ["windows", str(tmp_path / "nothing.csv"), "--out", str(tmp_path / "other")])
        assert outcome.exit_code == 2
        assert "There are no interactions at" in outcome.output


class TestItemNetwork:
    def test_the_whole_way_with_a_bayesian_model(self, folder, item_backbone, tmp_path):
        data = task("next_item_tokens", data_dir=folder)
        adapter = MixtureLoRA(rank=4, experts=2, gate_features=8)
        model = BayesianModel(item_backbone, data, adapter=adapter, prior=Flat())
        posterior = MAP(steps=3).fit(model, data.train, progress=False)
        probs = posterior.predict(data.test).mean_probs
        assert probs.shape == (len(data.test), 20)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(data.test)))
        saved = posterior.save_pretrained(tmp_path / "kept")
        kept = Posterior.from_pretrained(saved, item_backbone, data_dir=folder)
        torch.testing.assert_close(kept.predict(data.test).mean_probs, probs)

    def test_its_option_scores_are_logits_restricted_to_candidates(self, folder, item_backbone):
        data = task("next_item_tokens", data_dir=folder)
        model = BayesianModel(item_backbone, data, adapter=LoRA(rank=2))
        encoded = model.encode(data.test)
        batch = encoded.batch([0, 1])
        probs = model.row_logits(batch, model.initial()).softmax(-1)
        model.release()
        for place in (0, 1):
            row, example = encoded.rows[place], data.test.examples[place]
            prompt = [token for token, segment in zip(row.input_ids, row.segment_ids, strict=True) if segment == 1]
            logits = item_backbone.network(torch.tensor([prompt])).logits[0, -1]
            chosen = logits[example.vectors["candidate_items"] + len(("pad", "eos", "unk", "among", "next"))]
            torch.testing.assert_close(probs[place], chosen.softmax(-1), atol=1e-5, rtol=0)

    def test_it_is_a_backbone_like_others(self, item_backbone, tmp_path):
        save_item_network(item_backbone, tmp_path / "network")
        loaded = load_backbone(tmp_path / "network")
        assert loaded.fingerprint == item_backbone.fingerprint
        assert loaded.tokenizer("i3 among i7 next").input_ids == item_tokenizer(40)("i3 among i7 next").input_ids
        with pytest.raises(ValueError, match="Windows of one size"):
            fit_item_network([], 5)


@pytest.fixture
def hybrid(folder, tiny_llama, tiny_tokenizer):
    """A model with slots, over the tiny Llama, whose tokenizer knows few words and the slot."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<slot>"]})
    network = tiny_llama(torch.float64, vocab_size=len(tiny_tokenizer))
    backbone = Backbone(network, tiny_tokenizer, "tiny")
    data = task("next_item_hybrid", data_dir=folder)
    data = dataclasses.replace(data, format=HybridScoring("a\n{history}\nb\n{candidates}\nc", slot="<slot>"))
    adapters = [LoRA(rank=2), ItemProjector(hidden=12, features=8)]
    return BayesianModel(backbone, data, adapter=adapters)


class TestHybridPrompts:
    def test_slots_stand_for_the_items_in_order(self, hybrid):
        data = hybrid.task.test
        batch = hybrid.encode(data).batch([0, 1])
        slot = hybrid.backbone.tokenizer.convert_tokens_to_ids("<slot>")
        for row, example in enumerate(data.examples[:2]):
            places = batch["input_ids"][row] == slot
            assert (batch["items"][row] >= 0).equal(places)
            expected = torch.cat([example.vectors["history_items"], example.vectors["candidate_items"]])
            assert batch["items"][row][places].equal(expected)

    def test_a_prompt_that_is_cut_keeps_its_last_slots(self, hybrid):
        example = hybrid.task.test.examples[0]
        (row,) = hybrid.task.format.encode(hybrid.backbone.tokenizer, [example], 40)
        kept = [number for number in row.items if number >= 0]
        assert kept == example.vectors["candidate_items"].tolist()[-len(kept) :]
        assert 0 < len(kept) < 20

    def test_it_starts_as_the_plain_prompt_and_is_the_formula_after(self, hybrid):
        batch = hybrid.encode(hybrid.task.test).batch([0, 1])
        start = hybrid.initial()
        with_start = hybrid.row_logits(batch, start)
        hybrid.release()
        plain = hybrid.head(batch, (), None, 0)
        torch.testing.assert_close(with_start, plain, atol=0, rtol=0)
        draw = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in start.items()}
        table = hybrid.task.tables["items"].double()
        table = table / hybrid.task.tables["items"].std().double()
        caught = []
        embeddings = hybrid.backbone.network.get_input_embeddings()
        hybrid.row_logits(batch, draw)
        # registered after the adapters' hook, so that it sees what they made of the output
        handle = embeddings.register_forward_hook(lambda module, args, output: caught.append(output))
        hybrid.row_logits(batch, draw)
        handle.remove()
        inner, outer = draw["projector.inner"][0], draw["projector.outer"][0]
        for row, place in ((batch["items"] >= 0).nonzero()[[0, 7, -1]]).tolist():
            e = table[batch["items"][row, place]]
            hidden = torch.nn.functional.gelu(inner[:, :-1] @ e + inner[:, -1])
            expected = embeddings.weight[batch["input_ids"][row, place]] + outer[:, :-1] @ hidden + outer[:, -1]
            torch.testing.assert_close(caught[0][row, place], expected, atol=1e-6, rtol=1e-6)
        words = batch["items"] < 0
        torch.testing.assert_close(caught[0][words], embeddings.weight[batch["input_ids"][words]], atol=0, rtol=0)

    def test_the_projector_is_a_flat_point_and_trained(self, hybrid, tmp_path):
        posterior = MAP(steps=2).fit(hybrid, hybrid.task.train, progress=False)
        assert posterior.mean()["projector.outer"].abs().max() > 0
        assert hybrid.prior.to_dict()["projector.outer"] == {"prior": "Flat"}
        saved = posterior.save_pretrained(tmp_path / "kept")
        kept = Posterior.from_pretrained(saved, model=hybrid)
        assert torch.equal(kept.mean()["projector.outer"], posterior.mean()["projector.outer"])

    def test_draws_ride_on_the_batch(self, hybrid):
        batch = hybrid.encode(hybrid.task.test).batch([0, 1])
        draw = {name: 0.3 * torch.randn(3, *site.shape, dtype=torch.float64) for name, site in hybrid.sites.items()}
        together = hybrid.logits(batch, draw)
        for index in range(3):
            alone = hybrid.row_logits(batch, {name: value[index] for name, value in draw.items()})
            torch.testing.assert_close(together[index], alone, atol=1e-10, rtol=0)

    def test_bad_input(self, hybrid, folder, three_topics_model):
        example = hybrid.task.test.examples[0]
        with pytest.raises(ValueError, match="expected one token of its own"):
            HybridScoring("{history}", slot="<nothing>").encode(hybrid.backbone.tokenizer, [example], 300)
        with pytest.raises(ValueError, match="ItemProjector needs embeddings of items"):
            three_topics_model(adapter=ItemProjector())
        with pytest.raises(ValueError, match="Give it features=8"):
            BayesianModel(hybrid.backbone, hybrid.task, adapter=ItemProjector())
        batch = hybrid.encode(hybrid.task.test).batch([0])
        del batch["items"]
        with pytest.raises(ValueError, match="this forward has none"):
            hybrid.row_logits(batch, hybrid.initial())


class TestGeneratedAnswers:
    def test_valid_is_exactly_one_candidate(self):
        candidates = [["Alien (1979)", "Aliens (1986)", "Brazil (1985)"]] * 4 + [["Alien", "Aliens", "Brazil"]] * 2
        answers = ["alien (1979)", "Brazil (1985) or Alien (1979)", "none of them", "Brazil (1985)", "Aliens", "Alien"]
        found = count_answers(answers, candidates, [0, 0, 0, 0, 1, 0])
        # "Aliens" holds "Alien" too; the fourth is valid and wrong
        assert (found.total, found.valid, found.correct) == (6, 3, 2)
        assert found.valid_ratio == pytest.approx(3 / 6)
        assert found.hit_rate_of_valid == pytest.approx(2 / 3)
        assert found.hit_rate == pytest.approx(2 / 6)
        assert found.hit_rate == pytest.approx(found.hit_rate_of_valid * found.valid_ratio)

    def test_without_a_valid_answer_one_rate_is_not_defined(self):
        found = count_answers(["x"], [["a", "b"]], [0])
        assert found.hit_rate == 0
        assert np.isnan(found.hit_rate_of_valid)
        with pytest.raises(ValueError, match="expected one each"):
            count_answers(["x"], [], [])

    @pytest.mark.parametrize("beams", [1, 2])
    def test_answers_are_those_of_each_row_alone(self, hybrid, beams):
        draw = {name: 0.3 * torch.randn(site.shape, dtype=torch.float64) for name, site in hybrid.sites.items()}
        split = hybrid.task.test.subset(3)
        settings = {"max_new_tokens": 4, "num_beams": beams}
        together = generate_answers(hybrid, split, draw, **settings)
        alone = generate_answers(hybrid, split, draw, batch_size=1, **settings)
        assert together == alone
        assert any(together)
        changed = {**draw, "projector.outer": 5 * draw["projector.outer"]}
        assert generate_answers(hybrid, split, changed, **settings) != together
