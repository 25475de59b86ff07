"""The text of a run: never the half that is evaluated, a slice held out, datasets in their shares."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer

from teal_cli.adapt.data import Text, pools_of
from teal_cli.data import half_of, load_documents


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, float]:
    """Two texts of numbered words, the second with three times the weight."""
    weights = {}
    for name, weight in (("first", 1.0), ("second", 3.0)):
        file = tmp_path / f"{name}.jsonl"
        lines = (f'{{"text": "{name} document {index} of {name} {index * 7}"}}' for index in range(200))
        file.write_text("\n".join(lines))
        weights[str(file)] = weight
    return weights


def _texts(sequences: torch.Tensor) -> str:
    return build_tokenizer().decode(sequences.flatten().tolist())


def test_slices_do_not_share_a_document(corpora: dict[str, float]) -> None:
    pools = pools_of(corpora, build_tokenizer(), seq_len=16, count=400, validation=8, seed=3)
    for name, pool in pools.items():
        documents = {part: set(half_of(load_documents(name), part)) for part in ("calibration", "evaluation")}
        trained, held_out = _texts(pool.sequences), _texts(pool.held_out)
        assert not any(document in trained or document in held_out for document in documents["evaluation"])
        in_both = [document for document in documents["calibration"] if document in trained and document in held_out]
        assert in_both == []
        assert sum(document in trained for document in documents["calibration"]) > 40
        assert sum(document in held_out for document in documents["calibration"]) >= 1


def test_order_is_the_seeds_and_shares_are_the_weights(corpora: dict[str, float]) -> None:
    pools = pools_of(corpora, build_tokenizer(), seq_len=16, count=80, validation=2, seed=3)

    def rows(seed: int) -> list[tuple[list[int], int]]:
        text = Text(pools, corpora, count=400, most_prefix=8, seed=seed)
        return [(each["input_ids"].tolist(), int(each["dense_prefix"])) for each in map(text.__getitem__, range(400))]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)
    assert {prefix for _, prefix in rows(1)} == set(range(9))
    first = {tuple(row) for row in pools[next(iter(corpora))].sequences.tolist()}
    share = Counter(tuple(ids) in first for ids, _ in rows(1))[True] / 400
    assert 0.18 < share < 0.32


def test_a_short_text_is_read_again_in_another_order(corpora: dict[str, float]) -> None:
    name = next(iter(corpora))
    pools = pools_of({name: 1.0}, build_tokenizer(), seq_len=16, count=10_000, validation=2, seed=0)
    pool = pools[name]
    text = Text(pools, {name: 1.0}, count=2 * len(pool.sequences), most_prefix=0, seed=0)
    order = [tuple(text[index]["input_ids"].tolist()) for index in range(len(text))]
    half = len(pool.sequences)
    assert sorted(order[:half]) == sorted(order[half:])
    assert order[:half] != order[half:]
    assert text.repeats() == pytest.approx(2.0)
