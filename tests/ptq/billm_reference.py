"""BiLLM in float64, by its definition: plain loops over rows, candidates and columns. Slow, for small matrices."""

from __future__ import annotations

import numpy as np


def two_levels(values: np.ndarray) -> np.ndarray:
    """Some weights of one row, each as mean +- mean distance."""
    if not len(values):
        return values
    mean = values.mean()
    alpha = np.abs(values - mean).mean()
    return np.where(values >= mean, mean + alpha, mean - alpha)


def twice(values: np.ndarray) -> np.ndarray:
    first = two_levels(values)
    return first + two_levels(values - first)


def fill(w: np.ndarray, salient: np.ndarray, large: np.ndarray) -> np.ndarray:
    out = np.zeros_like(w)
    for row in range(len(w)):
        small_here, large_here = ~salient & ~large[row], ~salient & large[row]
        for where, method in ((small_here, two_levels), (large_here, two_levels), (salient, twice)):
            out[row, where] = method(w[row, where])
    return out


def find_salient(x, cost, salience, released: bool) -> np.ndarray:
    columns = x.shape[1]
    order = np.argsort(-salience.sum(0), kind="stable")
    best = None
    for count in range(1, max(2, min(50, columns))) if released else range(min(50, columns)):
        salient = np.zeros(columns, bool)
        salient[order[:count]] = True
        q = np.zeros_like(x)
        for row in range(len(x)):
            q[row, salient] = twice(x[row, salient])
            q[row, ~salient] = (twice if released else two_levels)(x[row, ~salient])
        error = (cost * (x - q) ** 2).sum()
        if best is None or error < best[0]:
            best = error, salient
    return best[1]


def find_large(x, cost, salient, released: bool) -> np.ndarray:
    pool = np.abs(x) * ~salient if released else np.abs(x[:, ~salient])
    best = None
    for limit in np.quantile(pool, np.linspace(0.1, 0.9, 81)):
        large = (np.abs(x) >= limit) & ~salient
        error = (cost * (x - fill(x, salient, large)) ** 2)[:, ~salient].sum()
        if best is None or error < best[0]:
            best = error, large
    return best[1]


def binarize(w: np.ndarray, diagonal: np.ndarray, variant: str) -> np.ndarray:
    released = variant == "released"
    salience = (w / diagonal) ** 2
    x, cost = (salience, np.ones(len(diagonal))) if released else (w, diagonal**-2)
    salient = find_salient(x, cost, salience, released)
    return fill(w, salient, find_large(x, cost, salient, released))


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """U with U^T U the inverse of the damped Hessian."""
    h = hessian.copy()
    np.fill_diagonal(h, np.where(np.diag(h) == 0, 1, np.diag(h)))
    h += damping * np.diag(h).mean() * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T


def matrix(w: np.ndarray, upper: np.ndarray, variant: str, block: int) -> np.ndarray:
    """Block by block. `clean`: the columns that are left are the least-squares optimum, taken from H itself."""
    w, columns = w.copy(), w.shape[1]
    h = np.linalg.inv(upper.T @ upper)
    original, out = w.copy(), np.zeros_like(w)
    for first in range(0, columns, block):
        now, later = slice(first, min(first + block, columns)), slice(min(first + block, columns), columns)
        out[:, now] = binarize(w[:, now], np.diag(upper)[now], variant)
        if variant == "released":
            for j in range(now.start, now.stop):
                error = (w[:, j] - out[:, j]) / upper[j, j]
                w[:, later] -= np.outer(error, upper[j, later])
        elif now.stop < columns:  # min over the later columns of tr(D H D^T), all earlier ones being fixed
            fixed = slice(0, now.stop)
            missed = original[:, fixed] - out[:, fixed]
            w[:, later] = (
                original[:, later] + np.linalg.solve(h[later, later], (missed @ h[fixed, later]).T).T
            )
    return out
