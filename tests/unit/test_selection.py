"""What to label next: published picks, an order that covers the pool, and baselines that do what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekd import labelling
from edgekd.errors import DataError, UsageError
from edgekd.selection import (
    STRATEGIES,
    Pick,
    Pool,
    best_per_class,
    choose,
    entropy,
    farthest_first,
    softmax,
)

NONE = np.zeros(0, np.int64)


def random_pool(size: int = 60, classes: int = 5, start: int = 6) -> Pool:
    rng = np.random.default_rng(3)
    rows = softmax(3 * rng.normal(size=(size + start, classes)))
    embeddings = rng.normal(size=(size + start, 7))
    labels = rows[size:].argmax(1)
    return Pool(rows[:size], rows[size:], labels, embeddings[:size], embeddings[size:])


def rows(picks: list[Pick]) -> list[int]:
    return [pick.index for pick in picks]


def test_the_published_picks_come_in_order(golden: dict[str, Any]) -> None:
    pool = softmax(2 * np.sin(1.3 * np.arange(1, 41).reshape(10, 4)))
    labelled = softmax(2 * np.cos(0.8 * np.arange(1, 9).reshape(2, 4)))
    picks = choose(Pool(pool, labelled, NONE), 4, "pcoreset", 0)
    assert rows(picks) == golden["losses"]["pcoreset_4"]["value"]
    reach = [pick.score for pick in picks]
    assert reach == sorted(reach, reverse=True)


def test_each_pick_is_the_farthest_from_all_before_it() -> None:
    pool = random_pool()
    picked, reach = farthest_first(pool.probabilities, pool.start, 12)
    chosen = list(pool.start)
    for index, distance in zip(picked, reach, strict=True):
        gaps = np.linalg.norm(pool.probabilities[:, None] - np.array(chosen)[None], axis=2).min(1)
        assert gaps[index] == pytest.approx(gaps.max())
        assert distance == pytest.approx(gaps.max())
        chosen.append(pool.probabilities[index])


def test_without_a_start_the_first_pick_is_in_the_middle_and_ties_go_to_the_lowest_row() -> None:
    points = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    picked, reach = farthest_first(points, points[:0], 4)
    assert picked.tolist() == [2, 0, 1, 3]
    assert reach.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_feature_coreset_does_not_see_the_length_of_an_embedding() -> None:
    pool = random_pool()
    assert pool.embeddings is not None
    scaled = Pool(
        pool.probabilities,
        pool.start,
        pool.start_labels,
        pool.embeddings * np.linspace(0.1, 9, len(pool.embeddings))[:, None],
        pool.start_embeddings,
    )
    assert rows(choose(pool, 9, "coreset", 0)) == rows(choose(scaled, 9, "coreset", 0))
    assert rows(choose(pool, 9, "coreset", 0)) != rows(choose(pool, 9, "pcoreset", 0))


def test_entropy_takes_the_least_certain_first() -> None:
    sure = np.array([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]])
    assert entropy(sure) == pytest.approx([0.0, np.log(2), 0.325083], abs=1e-6)
    assert rows(choose(Pool(sure, sure[:0], NONE), 2, "entropy", 0)) == [1, 2]


def test_class_balanced_fills_the_classes_with_the_fewest_labels() -> None:
    predicted = np.array([0, 0, 0, 0, 1, 1, 2])
    pool = Pool(np.eye(3)[predicted], np.eye(3)[[0, 0, 1]], np.array([0, 0, 1]))
    picks = choose(pool, 6, "class-balanced", 1)
    assert [int(predicted[i]) for i in rows(picks)] == [2, 1, 0, 1, 0, 0]


def test_random_is_the_seed_s() -> None:
    pool = random_pool()
    assert rows(choose(pool, 9, "random", 0)) == rows(choose(pool, 9, "random", 0))
    assert rows(choose(pool, 9, "random", 0)) != rows(choose(pool, 9, "random", 1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_whole_pool_can_be_chosen_and_nothing_twice(strategy: str) -> None:
    pool = random_pool(20)
    twice = Pool(
        np.concatenate([pool.probabilities] * 2), pool.start, pool.start_labels,
        np.concatenate([pool.embeddings] * 2), pool.start_embeddings,
    )  # fmt: skip
    picks = choose(twice, 40, strategy, 0)
    assert sorted(rows(picks)) == list(range(40))
    assert all(pick.reason for pick in picks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_budget_beyond_the_pool_is_refused(strategy: str) -> None:
    with pytest.raises(DataError, match="61 images is larger than the pool of 60"):
        choose(random_pool(), 61, strategy, 0)


def test_what_cannot_be_chosen_is_refused() -> None:
    pool = random_pool()
    with pytest.raises(UsageError, match="chooses nothing"):
        choose(pool, 0, "pcoreset", 0)
    with pytest.raises(UsageError, match="unknown strategy 'pcorset'"):
        choose(pool, 1, "pcorset", 0)
    with pytest.raises(DataError, match="needs the embeddings"):
        choose(Pool(pool.probabilities, pool.start, pool.start_labels), 3, "coreset", 0)


def test_the_best_of_each_class_are_kept() -> None:
    rows_ = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.9, 0.1]])
    assert best_per_class(rows_, 2).tolist() == [0, 3, 4]
    assert best_per_class(rows_, 0).tolist() == [0, 1, 2, 3, 4]


def test_the_command_offers_every_strategy() -> None:
    assert labelling._STRATEGIES == STRATEGIES
