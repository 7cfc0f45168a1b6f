"""Sites and the assignment of one value to each by glob patterns; nearest names."""

import pytest
import torch

from pyrolora.models.naming import close_names, nearest, suggestion
from pyrolora.models.sites import Site, SiteTable


def site(name):
    return Site(name, torch.Size((2, 3)), ("layer", "rank"))


@pytest.fixture
def table():
    return SiteTable([site("q_proj.lora_A"), site("q_proj.lora_B"), site("head.weight")])


class TestSiteTable:
    def test_it_keeps_program_order_and_counts_weights(self, table):
        assert list(table) == ["q_proj.lora_A", "q_proj.lora_B", "head.weight"]
        assert table["head.weight"].numel == 6

    def test_an_unknown_site_offers_the_nearest(self, table):
        with pytest.raises(KeyError, match=r"No site 'q_proj\.loraA'. Did you mean 'q_proj\.lora_A'"):
            table["q_proj.loraA"]
        assert "q_proj.loraA" not in table

    def test_two_sites_of_one_name_are_refused(self):
        with pytest.raises(ValueError, match="Two sites are named 'a'; give one of the adapters other targets"):
            SiteTable([site("b"), site("a"), site("a")])

    def test_patterns_match_with_case(self, table):
        assert [found.name for found in table.matching("*.lora_?")] == ["q_proj.lora_A", "q_proj.lora_B"]
        assert table.matching("*.lora_a") == []


class TestAssignment:
    def test_every_site_gets_its_one_value_in_site_order(self, table):
        assigned = table.assign({"head*": 3, "*.lora_B": 2, "*.lora_A": 1}, "prior")
        assert list(assigned.items()) == [("q_proj.lora_A", 1), ("q_proj.lora_B", 2), ("head.weight", 3)]

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            ({"*": 1, "*.lora_C": 2}, r"prior pattern '\*\.lora_C' matches no site. Did you mean 'q_proj\.lora_[AB]'"),
            ({"*": 1, "*.lora_A": 2}, r"'q_proj\.lora_A' matches two prior patterns, '\*' and '\*\.lora_A'"),
            ({"*.lora_*": 1}, r"No prior for the site 'head\.weight'.*sites without one: head\.weight"),
            ({}, r"No prior for the site 'q_proj\.lora_A'. Add a pattern"),
        ],
    )
    def test_unknown_patterns_overlaps_and_gaps_are_refused(self, table, patterns, message):
        with pytest.raises(ValueError, match=message):
            table.assign(patterns, "prior")


class TestNaming:
    def test_nearest_answers_however_far(self):
        assert nearest("bolb", ["map", "blob"]) == "blob"
        assert nearest("zzz", ["map"]) == "map"
        assert nearest("anything", []) is None

    def test_names_that_hold_every_part_come_before_close_ones(self):
        names = ["mmlu_chess", "mmlu_college_chemistry", "boolq"]
        assert close_names("mmlu_chem", names) == ["mmlu_college_chemistry", "mmlu_chess"]
        assert close_names("mmlu_chem", names, count=1) == ["mmlu_college_chemistry"]

    def test_a_suggestion_is_silent_when_nothing_is_close(self):
        assert suggestion("arc_esy", ["arc_easy", "boolq"]) == " Did you mean 'arc_easy'?"
        assert suggestion("zzz", ["arc_easy"]) == ""
