"""Data: small real tables, splits with a seed, and a reader for a user's own file."""

from probinfer.data.bundled import breast_cancer, co2, diabetes, nile, sunspots
from probinfer.data.dataset import Dataset
from probinfer.data.splits import kfold, ordered_split, random_split
from probinfer.data.table import Table, TableError, read_csv, split_target

__all__ = [
    "Dataset",
    "Table",
    "TableError",
    "breast_cancer",
    "co2",
    "diabetes",
    "kfold",
    "nile",
    "ordered_split",
    "random_split",
    "read_csv",
    "split_target",
    "sunspots",
]
