"""Data: small bundled data sets, splits of rows, and a reader of CSV files. Start with ``dataset``."""

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
