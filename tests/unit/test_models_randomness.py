import torch

from pyrolora.models.randomness import seeded


def test_draws_follow_the_seed_and_the_users_state_does_not_move():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.randn(4)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.randn(4), first)
    with seeded(4):
        assert not torch.equal(torch.randn(4), first)


def test_the_state_comes_back_after_an_error():
    before = torch.get_rng_state()
    try:
        with seeded(3):
            torch.randn(4)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)
