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


def partial_correlation(a, b, given):
    """Return Pearson's r of a and b: [runs] once their linear dependence on `given` is removed.

    Its interval (Fisher's z) and p-value (Student's t) have one degree of freedom less than those
    of `correlate`; with four runs the interval is all of [−1, 1].
    """
    (_, r_ab, r_ag), (_, _, r_bg), _ = np.corrcoef([a, b, given])
    r = (r_ab - r_ag * r_bg) / np.sqrt((1 - r_ag**2) * (1 - r_bg**2))
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


def median_of_few(values, reference=None):
    """Return the median of values: [runs], with its exact interval, that of the sign test.

    With `reference`, also the sign test's p-value of a median `reference`. Infinite values count as
    larger than all others; of fewer than six runs the interval is nan.
    """
    low, high = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    found = {"median": np.median(values), "low": low, "high": high}
    if reference is not None:
        found["p"] = stats.quantile_test(values, q=reference, p=0.5).pvalue
    return found


def compare_ratios(a, b, failed, little=0.01):
    """Return a / b of the losses of two methods, a, b: [runs, trials], paired, and which is lower.

    The ratio `of_each` run is the median over its trials; the verdict is the sign test's over runs,
    or that the median is within `little` of 1. `fail` counts the runs whose median loss is above
    `failed`, with Fisher's exact test. Two losses of which neither is finite are equal. b may have
    one run for all of a's.
    """
    with np.errstate(invalid="ignore"):
        ratio = np.median(np.where(np.isinf(a) & np.isinf(b), 1, a / b), axis=1)
    found = median_of_few(ratio, 1)
    if found["p"] > 0.05:
        lower = "unclear"
    elif abs(found["median"] - 1) < little:
        lower = f"neither by {little:.0%}"
    else:
        lower = "the first" if found["median"] < 1 else "the second"
    fail = [int((np.median(losses, axis=1) > failed).sum()) for losses in (a, b)]
    counts = [[fail[0], len(a) - fail[0]], [fail[1], len(b) - fail[1]]]
    fail_p = stats.fisher_exact(counts).pvalue
    return found | {"lower": lower, "of_each": ratio, "fail": fail, "fail_p": fail_p}
