"""The table of a posterior: a row for every scalar, with what is known of its accuracy."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.types import Array, ArrayTree, Float
from probinfer.inference import diagnostics
from probinfer.numerics import weights
from probinfer.targets.transforms import leaf_names

__all__ = ["Summary", "summarize"]

_COLUMNS = ("mean", "sd", "5%", "50%", "95%", "mcse_mean", "ess_bulk", "ess_tail", "rhat")
_CHUNK = 16  # quantities summarized by one compiled call, whatever their number
_MAX_ROWS = 100


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of every scalar quantity, a row each: ``summary["kernel.lengthscale[0]"]["mean"]``.

    Attributes:
        names: row names: the dotted path of the leaf, with indices for arrays.
        columns: column name -> values (rows,): mean, sd, 5%, 50%, 95%, mcse_mean (Monte Carlo standard error
            of the mean), ess_bulk, ess_tail, rhat. NaN where a statistic is not defined.
        note: one sentence on the draws.
    """

    names: tuple[str, ...]
    columns: dict[str, np.ndarray]
    note: str

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> dict[str, float]:
        """Return a row.

        Raises:
            KeyError: there is no such row.
        """
        if name not in self.names:
            near = [row for row in self.names if row.startswith(name + "[")] or list(self.names)
            raise KeyError(
                f"no quantity '{name}'; there is {', '.join(near[:10])}{', ...' if near[10:] else ''}"
            )
        row = self.names.index(name)
        return {column: float(values[row]) for column, values in self.columns.items()}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return row name -> column name -> number."""
        rows = zip(*(values.tolist() for values in self.columns.values()), strict=True)
        return {
            name: dict(zip(self.columns, row, strict=True))
            for name, row in zip(self.names, rows, strict=True)
        }

    def __str__(self) -> str:
        header, rows = self._cells()
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(map(_align, row, widths, range(len(row)))).rstrip() for row in [header, *rows]]
        return "\n".join([*lines, self._footer()])

    def _repr_html_(self) -> str:
        header, rows = self._cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        caption = f"<caption>{html.escape(self._footer())}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [name, *(_format(column, float(values[i])) for column, values in self.columns.items())]
            for i, name in enumerate(self.names[:_MAX_ROWS])
        ]
        return ["", *self.columns], rows

    def _footer(self) -> str:
        hidden = len(self) - _MAX_ROWS
        return self.note + (f"; {hidden} more rows in .to_dict()" if hidden > 0 else "")


def summarize(draws: ArrayTree, log_weights: Float[Array, "chain draw"] | None = None) -> Summary:
    """Summarize every scalar of a tree of draws.

    Args:
        draws: pytree with leaves (chain, draw, ...), floating, integer or boolean.
        log_weights: unnormalized log weights; None: equal.

    Returns:
        The table. Weighted draws have no Monte Carlo error, chain ESS or R-hat: these say nothing about
        weights; a single chain has no R-hat. The note gives the effective sample size of the weights.

    Raises:
        ValueError: ``draws`` has no leaves with leading axes (chain, draw).
    """
    names, columns = _row_names(draws), _columns(draws)
    flat = None if log_weights is None else jnp.ravel(log_weights).astype(columns.dtype)
    parts = []
    for start in range(0, len(names), _CHUNK):
        chunk = columns[start : start + _CHUNK]
        padded = jnp.pad(chunk, ((0, _CHUNK - len(chunk)), (0, 0), (0, 0)))
        parts.append(np.asarray(_statistics(padded, flat))[:, : len(chunk)])
    table = np.concatenate(parts, axis=1) if parts else np.zeros((len(_COLUMNS), 0))
    return Summary(names, dict(zip(_COLUMNS, table, strict=True)), _note(columns.shape[1:], flat))


@jax.jit
def _statistics(columns: Float[Array, "k chain draw"], log_weights: Float[Array, " n"] | None) -> Array:
    equal = jnp.zeros(columns.shape[1] * columns.shape[2], columns.dtype)
    flat_weights = equal if log_weights is None else log_weights
    flat = columns.reshape(len(columns), -1).T
    quantiles = weights.quantile(flat_weights, flat, jnp.asarray([0.05, 0.5, 0.95], columns.dtype))
    sd = jnp.sqrt(weights.variance(flat_weights, flat))
    if log_weights is None:
        draws = jnp.moveaxis(columns, 0, 2)
        accuracy = [diagnostics.mcse_mean, diagnostics.ess, diagnostics.ess_tail, diagnostics.rhat]
        rest = jnp.stack([statistic(draws) for statistic in accuracy])
    else:
        rest = jnp.full((4, len(columns)), jnp.nan, columns.dtype)
    return jnp.concatenate([jnp.stack([weights.mean(flat_weights, flat), sd]), quantiles, rest])


def _columns(draws: ArrayTree) -> Array:
    leaves = jax.tree.leaves(draws)
    dtype = jnp.result_type(*leaves)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    flat = [jnp.asarray(leaf).reshape(*leaf.shape[:2], -1).astype(dtype) for leaf in leaves]
    return jnp.moveaxis(jnp.concatenate(flat, axis=2), 2, 0)


def _row_names(draws: ArrayTree) -> tuple[str, ...]:
    rows = []
    for name, leaf in zip(leaf_names(draws), jax.tree.leaves(draws), strict=True):
        for index in np.ndindex(leaf.shape[2:]):
            rows.append(f"{name}[{','.join(map(str, index))}]" if index else name)
    return tuple(rows)


def _note(leading: tuple[int, ...], log_weights: Array | None) -> str:
    num_chains, num_draws = leading
    note = f"{num_chains} chain{'s' if num_chains > 1 else ''} of {num_draws} draws"
    if log_weights is None:
        return note
    return f"{note}, weighted: worth {float(weights.ess(log_weights)):.1f} equally weighted ones"


def _align(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def _format(column: str, value: float) -> str:
    if np.isnan(value):
        return "-"
    if column.startswith("ess"):
        return f"{value:.0f}"
    return f"{value:.3f}" if column == "rhat" else f"{value:.4g}"
