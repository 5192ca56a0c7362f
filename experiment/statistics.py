"""Intervals, paired differences and correlations, by scipy.stats. All intervals are of 95 %."""

import warnings

import numpy as np
from scipy import stats


def paired_difference(a, b):
    """Return the mean of a − b over runs, a and b: [..., runs], with Student's paired interval.

    Under `mean`, `low` and `high` are arrays [...]. Runs of which one is nan, since it diverged,
    are left out; of fewer than two the interval is nan.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    with warnings.catch_warnings():  # of runs that are all the same, or too few
        warnings.simplefilter("ignore")
        test = stats.ttest_rel(a, b, axis=-1, nan_policy="omit")
        low, high = test.confidence_interval(0.95)
        return {"mean": np.nanmean(a - b, axis=-1), "low": low, "high": high}


def compare_arms(loss, pairs, epochs):
    """Return {"a − b": {epoch: `paired_difference`}} of pairs a, b; loss: {arm: [epochs, runs]}."""
    return {
        f"{a} − {b}": {e: paired_difference(loss[a][e - 1], loss[b][e - 1]) for e in epochs}
        for a, b in pairs
    }


def correlate(a, b):
    """Return Pearson's r of a, b: [runs] with its interval and p-value, and Spearman's ρ and p."""
    pearson, spearman = stats.pearsonr(a, b), stats.spearmanr(a, b)
    return {
        "pearson": pearson.statistic,
        "interval": list(pearson.confidence_interval(0.95)),
        "p": pearson.pvalue,
        "spearman": spearman.statistic,
        "spearman_p": spearman.pvalue,
    }


def partial_correlation(a, b, control):
    """Return Pearson's r of a and b: [runs] once their linear dependence on `control` is removed.

    Its interval (Fisher's z) and p-value (Student's t) have one degree of freedom less than those
    of `correlate`; with four runs the interval is all of [−1, 1].
    """
    (_, r_ab, r_ac), (_, _, r_bc), _ = np.corrcoef([a, b, control])
    r = (r_ab - r_ac * r_bc) / np.sqrt((1 - r_ac**2) * (1 - r_bc**2))
    df = len(a) - 3
    with np.errstate(divide="ignore"):
        width = stats.norm.ppf(0.975) / np.sqrt(df - 1)
    p = 2 * stats.t.sf(abs(r) * np.sqrt(df / (1 - r**2)), df)
    return {"pearson": r, "interval": list(np.tanh(np.arctanh(r) + [-width, width])), "p": p}


def p_of_difference(r, runs, other, other_runs):
    """Return the p-value of the difference of two correlations, each across so many runs."""
    error = np.sqrt(1 / (runs - 3) + 1 / (other_runs - 3))
    return 2 * stats.norm.sf(abs(np.arctanh(r) - np.arctanh(other)) / error)


def holm(p):
    """Return p-values [tests] adjusted by Holm's method, for a family of tests."""
    p = np.asarray(p, float)
    order = p.argsort()
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted[order.argsort()]
