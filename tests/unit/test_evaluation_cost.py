import time

import pytest
import torch

from pyrolora.inference.evaluation import Cost, measure_cost


def test_seconds_and_peak_of_memory_that_is_gone_at_the_end():
    with measure_cost() as before:
        time.sleep(0.05)
    with measure_cost() as cost:
        ballast = torch.ones(50_000_000)
        time.sleep(0.15)
        del ballast
    assert 0.15 <= cost.seconds < 5
    assert cost.peak_memory_bytes - before.peak_memory_bytes > 120_000_000


def test_filled_when_the_block_fails():
    costs = []

    def failing_fit():
        with measure_cost("cpu") as cost:
            costs.append(cost)
            raise KeyError("fit failed")

    with pytest.raises(KeyError):
        failing_fit()
    assert costs[0].seconds >= 0
    assert costs[0].peak_memory_bytes > 0


def test_unknown_device_and_round_trip():
    with pytest.raises(ValueError, match="got 'meta'"), measure_cost("meta"):
        pass
    assert Cost.from_dict(Cost(1.5, 10).to_dict()) == Cost(1.5, 10)
    assert Cost().to_dict()["seconds"] is None
