"""Acceptance, lookup and pace: pure maths, against definitions and distributions."""

import pytest
import torch
from chi_square import chi_square_p
from torch import Tensor

from teal_cli.decode.speculate.accept import accept_greedy, accept_sampled
from teal_cli.decode.speculate.lookup import NGrams
from teal_cli.decode.speculate.pace import NOTHING, Offer, Pace
from teal_cli.speculation import FORMS, Speculation

MODEL, LOOKUP = Offer("model", "model", 7), Offer("lookup", "lookup of 3", 7, is_free=True)
LEAST_P = 1e-3
"""Of a chi-square test with a fixed seed: a wrong rule gave below 1e-20."""


def test_greedy_accepts_until_the_first_other_token() -> None:
    best = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [1, 6, 7, 8], [5, 6, 9, 8]])
    drafted = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 6, 7], [5, 6, 7]])
    accepted, behind = accept_greedy(best, drafted)
    assert accepted.tolist() == [3, 1, 0, 2]
    assert behind.tolist() == [8, 6, 1, 9]
    accepted, behind = accept_greedy(best[:, :1], drafted[:, :0])
    assert accepted.tolist() == [0] * 4
    assert behind.tolist() == [5, 5, 1, 5]


def _peaked(*shape: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.randn(*shape, generator=generator)).softmax(-1)


@pytest.mark.parametrize("certain", [False, True])
def test_accepted_tokens_are_distributed_as_the_model_has_them(certain: bool) -> None:
    """Of a Markov chain of six tokens: the first token, and each one given that before it, by chi-square."""
    rows, vocabulary = 200_000, 6
    generator = torch.Generator().manual_seed(3)
    first, then = _peaked(vocabulary, generator=generator), _peaked(vocabulary, vocabulary, generator=generator)
    offered_first = _peaked(vocabulary, generator=generator)
    offered_then = _peaked(vocabulary, vocabulary, generator=generator)
    offered_first[2] = 0.0  # a token that the draft never offers
    offered_first /= offered_first.sum()
    drawn = torch.multinomial(offered_first, rows, replacement=True, generator=generator)
    second = torch.multinomial(offered_then[drawn], 1, generator=generator)[:, 0]
    offered = torch.stack([offered_first.expand(rows, -1), offered_then[drawn]], 1)
    wanted = torch.stack([first.expand(rows, -1), then[drawn], then[second]], 1)
    drafted = torch.stack([drawn, second], 1)
    accepted, behind = accept_sampled(wanted, drafted, None if certain else offered, generator)
    assert sorted(accepted.unique().tolist()) == [0, 1, 2]
    tokens = torch.where(accepted > 0, drawn, behind)
    assert chi_square_p(tokens.bincount(minlength=vocabulary), first) > LEAST_P
    following = torch.where(accepted > 1, second, behind)
    for token in range(vocabulary):
        for these in (following[(accepted > 0) & (drawn == token)], behind[(accepted == 2) & (second == token)]):
            if len(these) > 500:
                assert chi_square_p(these.bincount(minlength=vocabulary), then[token]) > LEAST_P


def test_a_draft_like_the_model_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = _peaked(1000, 4, 50, generator=generator)
    drafted = torch.multinomial(wanted[:, :3].flatten(0, 1), 1, generator=generator).view(1000, 3)
    accepted, _ = accept_sampled(wanted, drafted, wanted[:, :3], generator)
    assert accepted.tolist() == [3] * 1000


def test_lookup_finds_the_longest_and_latest() -> None:
    text = NGrams()
    assert text.following(3) == ([], 0)
    text.extend([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3])
    assert text.following(3) == ([7, 8, 2], 2)  # behind the later 2 3
    text.extend([4])
    assert text.following(2) == ([9, 2], 3)  # 2 3 4 stood at the start
    text.extend([5])
    assert text.following(2) == ([], 0)


def test_lookup_goes_on_with_text_that_repeats_itself() -> None:
    text = NGrams()
    text.extend([4, 5, 6, 4, 5])
    assert text.following(7) == ([6, 4, 5, 6, 4, 5, 6], 2)


def _run(pace: Pace, share: float, seconds: dict[tuple[str, int], float], passes: int) -> tuple[float, list[int]]:
    """Time of a token over that of a plain pass, and the numbers that were drafted."""
    generator = torch.Generator().manual_seed(1)
    spent, tokens, counts = 0.0, 0, []
    for _ in range(passes):
        offer, count = pace.choose([LOOKUP, MODEL] if ("lookup", 1) in seconds else [MODEL], 7)
        right = torch.rand(count, generator=generator) < share
        accepted = int(right.long().cumprod(0).sum())
        took = seconds[offer.source, count]
        pace.record(offer, count, min(accepted + 1, count), accepted, took)
        spent, tokens = spent + took, tokens + accepted + 1
        counts.append(count)
    return spent / tokens / seconds["", 0], counts


COSTS = {("", 0): 1.0, ("model", 1): 1.55, ("model", 3): 2.7, ("model", 7): 5.6}


@pytest.mark.parametrize(
    ("share", "usual", "most"),
    # Best of these counts, by hand: at 0.97 three tokens give 3.82 for 2.7, at 0.75 one gives 1.75 for 1.55.
    [(0.97, 3, 0.76), (0.75, 1, 0.95), (0.2, 0, 1.03)],
)
def test_pace_drafts_as_many_as_pay(share: float, usual: int, most: float) -> None:
    time, counts = _run(Pace([1, 3, 7]), share, COSTS, 500)
    assert max(set(counts), key=counts.count) == usual
    assert time < most


def test_drafts_that_are_always_wrong_cost_less_than_three_per_cent() -> None:
    for passes in (256, 2000):
        time, counts = _run(Pace([1, 3, 7]), 0.0, COSTS, passes)
        assert time < 1.03
        assert any(counts)


def test_passes_that_draft_nothing_for_certain_are_said() -> None:
    """As many as then follow, whether they are taken one by one or together."""
    plain, together = Pace([1, 3, 7]), Pace([1, 3, 7])
    assert plain.certain([MODEL]) == 1  # nothing was measured yet
    for pace in (plain, together):
        _run(pace, 0.0, COSTS, 60)
        while pace.choose([MODEL], 7)[1]:
            pace.record(MODEL, 1, 1, 0, COSTS["model", 1])
    certain = together.certain([MODEL])
    assert certain > 4
    together.record_plain(certain, 1.0)
    assert together.choose([MODEL], 7)[1] > 0
    plain.record(NOTHING, 0, 0, 0, 1.0)
    for _ in range(certain - 1):
        assert plain.choose([MODEL], 7)[1] == 0
        plain.record(NOTHING, 0, 0, 0, 1.0)
    assert plain.choose([MODEL], 7)[1] > 0
    assert together.certain([LOOKUP, MODEL]) == 1  # the text may repeat itself at any token


def test_a_free_draft_is_taken_where_it_pays_more() -> None:
    costs = COSTS | {("lookup", count): 1 + 0.05 * count for count in (1, 3, 7)}
    pace = Pace([1, 3, 7])
    _run(pace, 0.9, costs, 100)
    assert pace.choose([LOOKUP, MODEL], 7)[0] == LOOKUP
    assert pace.choose([LOOKUP, MODEL], 2)[1] == 1  # where there is room for no more


def test_a_pace_without_times_chooses_the_same_whatever_passes_took() -> None:
    chosen = []
    for pace_of_machine in (1.0, 9.0):
        pace = Pace([1, 3, 7], timed=False)
        chosen.append([])
        for index in range(300):
            share = 1.0 if index < 100 else 0.0
            offer, count = pace.choose([MODEL], 7)
            pace.record(offer, count, count and 1, count and int(share), pace_of_machine**count)
            chosen[-1].append(count)
    assert chosen[0] == chosen[1]
    assert max(chosen[0]) == 7
    assert chosen[0][150:].count(0) > 120  # what is never right is seldom drafted
    assert chosen[0][0] > 0


def test_pace_learns_that_a_text_has_changed() -> None:
    pace = Pace([1, 3, 7])
    _run(pace, 0.1, COSTS, 300)
    _, counts = _run(pace, 0.97, COSTS, 3000)
    assert counts[-1] == 3


def test_a_fixed_number_is_drafted_whatever_it_costs() -> None:
    pace = Pace([1, 3, 7], fixed=5)
    assert pace.choose([MODEL], 7) == (MODEL, 5)
    assert pace.choose([MODEL], 2) == (MODEL, 2)
    assert pace.choose([Offer("lookup", "lookup", 0), MODEL], 7) == (MODEL, 5)
    assert pace.choose([MODEL], 0) == (NOTHING, 0)


@pytest.mark.parametrize("text", ["lookup", "sparse", "int8", "int4:128", "int4:64+sparse", "lookup+int8+sparse"])
def test_kinds_of_drafts(text: str) -> None:
    assert Speculation.parse(text).text == text
    assert Speculation.parse(text).has_model == (text != "lookup")


@pytest.mark.parametrize("text", ["", "dense", "int8+int4", "lookup+lookup", "int5", "sparse+", "int4:33"])
def test_what_is_no_kind_of_draft(text: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        Speculation.parse(text)
    assert FORMS in str(caught.value)
