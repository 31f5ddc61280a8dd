"""Tests between encoders: by hand, and how often they cry wolf where nothing differs."""

import numpy as np
import pytest
from scipy import stats

from stages.common import comparisons, intervals, pairs, scores
from stages.common.pairs import Pairs
from tests.common.predicted import predictions


def cells_of(count: int, heads: tuple[str, ...] = ("abmil",), **settings: float) -> dict:
    """Encoders e0, e1 ... whose scores differ by chance, and e0's by a stronger signal."""
    return {
        (f"e{at}", head): scores.of_part(
            predictions(**settings, encoder=at, signal=3.0 if at == 0 else 0.8), 2
        )
        for head in heads
        for at in range(count)
    }


def test_holm_by_hand() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    expected = [0.03, 0.06, np.nan, 0.06, 0.02]  # x3, then 0.06 carried on, x2, x4
    assert comparisons.holm(p) == pytest.approx(np.array(expected), nan_ok=True)
    assert comparisons.holm(np.array([0.9, 0.6])).tolist() == [1.0, 1.0]


def test_resampled_t_by_hand() -> None:
    """Ten splits of five folds: variance 0.0025 x (1/10 + 1/4), nine degrees of freedom."""
    differences = np.array([0.07, 0.12, -0.02, 0.05, 0.1, 0.03, 0.04, 0.11, 0.0, 0.1])
    s2 = sum((d - 0.06) ** 2 for d in differences) / 9
    error = np.sqrt((0.1 + 0.25) * s2)
    found = comparisons.resampled_t(differences, 5)
    assert found.value == pytest.approx(0.06)
    assert found.p == pytest.approx(2 * stats.t.sf(0.06 / error, 9))
    assert found.high - 0.06 == pytest.approx(2.262157 * error, rel=1e-6)
    naive = stats.ttest_1samp(differences, 0).pvalue
    assert naive < 0.01 < 0.05 < found.p


@pytest.mark.parametrize(
    ("only_one", "only_other", "p"), [(9, 1, 22 / 1024), (3, 3, 1.0), (0, 0, 1.0), (0, 5, 1 / 16)]
)
def test_mcnemars_p_is_the_binomials(only_one: int, only_other: int, p: float) -> None:
    one = np.array([True] * (only_one + 4) + [False] * (only_other + 2))
    other = np.array([False] * only_one + [True] * (4 + only_other) + [False] * 2)
    found = comparisons.mcnemar(one, other)
    assert found == (pytest.approx(p), only_one, only_other)


def two(generator: np.random.Generator, size: int, shift: float) -> list[Pairs]:
    """The difference of two scores that share half of their noise."""
    shared = generator.normal(size=(2, size))
    wins = []
    for _ in range(2):
        score = shared + generator.normal(size=(2, size)) + [[shift], [0.0]]
        wins.append((score[0][:, None] > score[1]).astype(np.float64))
    numbers = np.arange(2 * size)
    return [Pairs(1, wins[0] - wins[1], numbers[:size], numbers[size:])]


def test_equal_encoders_differ_in_one_test_of_twenty() -> None:
    generator = np.random.default_rng(8)
    rounds, size = 500, 40
    low = {"delong": 0, "bootstrap": 0}
    for _ in range(rounds):
        gaps = two(generator, size, 1.5)
        draws = [generator.multinomial(size, np.full(size, 1 / size), 400) for _ in range(2)]
        low["delong"] += comparisons.delong(gaps).p < 0.05
        low["bootstrap"] += comparisons.bootstrap(gaps, np.hstack(draws)).p < 0.05
    for name, count in low.items():
        assert 0.025 < count / rounds < 0.085, name


def differences_over_folds(generator: np.random.Generator, repeats: int, folds: int) -> np.ndarray:
    """Two centroid classifiers, each on three numbers of its own, of 60 slides in equal folds."""
    label = np.arange(60) % 2
    features = generator.normal(size=(2, 60, 3)) + 0.5 * label[:, None]
    found = []
    for _ in range(repeats):
        place = generator.permutation(60) % folds
        for fold in range(folds):
            train, test = place != fold, place == fold
            areas = []
            for of in features:
                way = of[train & (label == 1)].mean(0) - of[train & (label == 0)].mean(0)
                score = of[test] @ way
                truth = label[test] == 1
                areas.append((score[truth][:, None] > score[~truth]).mean())
            found.append(areas[0] - areas[1])
    return np.array(found)


def test_folds_cry_wolf_without_the_correction_and_not_with_it() -> None:
    generator = np.random.default_rng(9)
    rounds = 150
    tables = [differences_over_folds(generator, 3, 5) for _ in range(rounds)]
    corrected = np.mean([comparisons.resampled_t(table, 5).p < 0.05 for table in tables])
    naive = np.mean([stats.ttest_1samp(table, 0).pvalue < 0.05 for table in tables])
    # The slides are one sample of many: some of their luck stays in every fold.
    assert naive > 0.25 and corrected < 0.5 * naive and corrected < 0.2


def test_a_row_holds_the_effect_its_interval_and_every_p() -> None:
    cells = cells_of(2, slides=200, seeds=2)
    (row,) = comparisons.table(cells, "", 5, 2000).to_dict("records")
    one, other = (pairs.pairs_of(cells[name, "abmil"]) for name in ("e0", "e1"))
    assert (row["encoder"], row["other"], row["test"]) == ("e0", "e1", "delong")
    assert row["auc_difference"] == pytest.approx(pairs.auc(one) - pairs.auc(other))
    error = np.sqrt(pairs.variance([one[0] - other[0]]))
    expected = row["auc_difference"] + 1.959964 * error * np.array([-1, 1])
    assert [row["auc_difference_low"], row["auc_difference_high"]] == pytest.approx(expected)
    assert row["p"] == row["p_holm"] == row["p_delong"]
    assert row["p"] == pytest.approx(2 * stats.norm.sf(row["auc_difference"] / error))
    assert [row["bootstrap_low"], row["bootstrap_high"]] == pytest.approx(expected, abs=0.02)
    assert row["p_bootstrap"] < 0.01 and row["only_encoder_right"] > row["only_other_right"]
    assert "p_resampled_t" not in row


def test_over_folds_the_resampled_t_decides() -> None:
    cells = cells_of(2, slides=60, repeats=2, folds=3, seeds=2)
    (row,) = comparisons.table(cells, "", 5, 200).to_dict("records")
    by_split = [
        pairs.auc(pairs.pairs_of([left])) - pairs.auc(pairs.pairs_of([right]))
        for left, right in zip(*cells.values(), strict=True)
    ]
    expected = comparisons.resampled_t(np.array(by_split), 3)
    assert (row["test"], row["p"]) == ("resampled_t", pytest.approx(expected.p))
    assert row["auc_difference_low"] == pytest.approx(expected.low)
    right = [
        [fold.ensemble().called()[0] == fold.label for fold in folds if fold.repeat == 0]
        for folds in cells.values()
    ]
    one, other = (np.concatenate(of_encoder) for of_encoder in right)
    expected = comparisons.mcnemar(one, other)  # each slide once: of the first repeat
    found = tuple(row[name] for name in ("p_mcnemar", "only_encoder_right", "only_other_right"))
    assert len(one) == 60 and found == expected


def test_holms_family_is_all_heads_and_pairs() -> None:
    table = comparisons.table(cells_of(3, ("abmil", "less")), "", 0, 200)
    assert table[["head", "encoder", "other"]].to_numpy().tolist() == [
        [head, *pair]
        for head in ("abmil", "less")
        for pair in (["e0", "e1"], ["e0", "e2"], ["e1", "e2"])
    ]
    assert table.p_holm.to_numpy() == pytest.approx(comparisons.holm(table.p.to_numpy()))
    assert (table.p_holm >= table.p).all() and table.p_holm.min() == 6 * table.p.min()


def test_a_reference_is_compared_with_all_others() -> None:
    table = comparisons.table(cells_of(3), "e1", 0, 100)
    assert table[["encoder", "other"]].to_numpy().tolist() == [["e1", "e0"], ["e1", "e2"]]
    with pytest.raises(ValueError, match="reference is e7: .* one of embed.encoders, e0, e1, e2"):
        comparisons.table(cells_of(3), "e7", 0, 100)


def test_one_encoder_has_no_comparison() -> None:
    found = comparisons.table(cells_of(1), "", 0, 100)
    assert found.empty and found.to_csv(index=False) == "head,encoder,other,test\n"


def test_an_encoder_does_not_differ_from_itself() -> None:
    cells = cells_of(1, repeats=2, folds=3, slides=60)
    cells["same", "abmil"] = cells["e0", "abmil"]
    (row,) = comparisons.table(cells, "", 0, 100).to_dict("records")
    p = [value for name, value in row.items() if name.startswith("p")]
    ends = row["auc_difference_low"], row["auc_difference_high"]
    assert np.isnan(ends).all() and row["auc_difference"] == 0 and set(p) == {1.0}


def test_rejects_encoders_scored_on_different_slides() -> None:
    cells = cells_of(1) | {("e1", "abmil"): scores.of_part(predictions(slides=80), 2)}
    with pytest.raises(ValueError, match="e0 and e1 were not scored on the same splits, slides"):
        comparisons.table(cells, "", 0, 100)


def test_the_same_seed_gives_the_same_resamples() -> None:
    folds = cells_of(1)["e0", "abmil"]
    patients = pairs.patients_of(folds)
    first, again, other = (intervals.resamples(folds, patients, seed, 9) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
