"""Data: the bundled tables are correct, splits are complete and repeatable, bad files raise clear errors."""

import measurements
import numpy as np
import pytest

from probinfer import data


@pytest.mark.parametrize(
    ("load", "shape"),
    [(data.diabetes, (442, 10)), (data.co2, (521, 1)), (data.sunspots, (309, 1)), (data.nile, (100, 1))],
)
def test_bundled_tables(load, shape):
    table = load()
    assert table.X.shape == shape
    assert table.y.shape == shape[:1]
    assert len(table.feature_names) == shape[1]
    assert table.X.dtype == table.y.dtype == np.float64
    assert np.isfinite(table.X).all()
    assert np.isfinite(table.y).all()
    assert table.source
    assert table.license
    assert load().name == table.name


def test_diabetes_is_raw():
    table = data.diabetes()
    np.testing.assert_allclose(table.X[0, :4], [59.0, 2.0, 32.1, 101.0])
    assert table.y[0] == 151.0


def test_co2_months_are_means_of_their_weeks():
    table = data.co2()
    # April 1958 by hand: 317.3, 317.6, 317.5 and 316.4 are the weeks with data.
    april = np.argmin(np.abs(table.X[:, 0] - (1958 + 3.5 / 12)))
    assert table.y[april] == pytest.approx(np.mean([317.3, 317.6, 317.5, 316.4]))
    assert (np.diff(table.X[:, 0]) > 0).all()
    assert np.diff(table.X[:, 0]).min() == pytest.approx(1 / 12)


def test_take_keeps_the_description():
    table = data.nile().take(np.arange(0, 100, 10))
    assert table.X.shape == (10, 1)
    assert table.name == "nile"


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"probinfer\[data\]"):
        data.diabetes()


def test_splits_cover_every_row_once():
    for train, test in data.kfold(23, 5, seed=1):
        assert sorted([*train, *test]) == list(range(23))
        assert len(test) in (4, 5)
    tests = np.concatenate([test for _, test in data.kfold(23, 5, seed=1)])
    assert sorted(tests) == list(range(23))
    train, test = data.random_split(10, 0.7, seed=0)
    assert len(train) == 7
    assert sorted([*train, *test]) == list(range(10))
    train, test = data.ordered_split(10, 0.75)
    assert train.tolist() == list(range(8))
    assert test.tolist() == [8, 9]


def test_seeds_decide():
    first, second = data.random_split(50, 0.5, seed=3)[0], data.random_split(50, 0.5, seed=3)[0]
    assert first.tolist() == second.tolist()
    assert first.tolist() != data.random_split(50, 0.5, seed=4)[0].tolist()


def test_impossible_splits():
    with pytest.raises(ValueError, match="between 2 and the number of rows"):
        data.kfold(3, 4, seed=0)
    with pytest.raises(ValueError, match="between 2"):
        data.kfold(3, 1, seed=0)
    with pytest.raises(ValueError, match="leaves one part empty"):
        data.random_split(10, 1.0, seed=0)
    with pytest.raises(ValueError, match="leaves one part empty"):
        data.ordered_split(1, 0.5)


def test_measurement_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("PROBINFER_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"set the environment variable PROBINFER_DATA.*concrete\.csv"
    ):
        measurements.measurement("concrete")
    monkeypatch.setenv("PROBINFER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="not a folder"):
        measurements.measurement("concrete")
    monkeypatch.setenv("PROBINFER_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no file gp/concrete\.csv"):
        measurements.measurement("concrete")
    with pytest.raises(ValueError, match="concrete, winequality_red, yacht, airline"):
        measurements.measurement("cement")


def test_measurement_reads_each_layout(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBINFER_DATA", str(tmp_path))
    (tmp_path / "gp").mkdir()
    (tmp_path / "gp/AirPassengers.csv").write_text("Month,Passengers\n1949-01-01,112\n1949-02-01,118\n")
    airline = measurements.measurement("airline")
    np.testing.assert_allclose(airline.X[:, 0], [1949 + 0.5 / 12, 1949 + 1.5 / 12])
    np.testing.assert_allclose(airline.y, [112, 118])
    (tmp_path / "gp/yacht_hydrodynamics.data").write_text("1 2 3 4 5 6 7\n7 6 5 4 3 2 1\n")
    yacht = measurements.measurement("yacht")
    np.testing.assert_allclose(yacht.X[1], [7, 6, 5, 4, 3, 2])
    np.testing.assert_allclose(yacht.y, [7, 1])
    (tmp_path / "gp/concrete.csv").write_text("a,b\n1 ,2 \n")
    with pytest.raises(ValueError, match="should have 9 numeric columns"):
        measurements.measurement("concrete")
    assert set(measurements.measurement_names()) == {"concrete", "winequality_red", "yacht", "airline"}


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_reads_separators(tmp_path, separator):
    text = "\ufeff a ,b,y\n1,2,3\n\n4,5e-1,6\n".replace(",", separator)
    table = data.read_csv(write(tmp_path, text))
    assert table.names == ("a", "b", "y")
    np.testing.assert_allclose(table.values, [[1, 2, 3], [4, 0.5, 6]])
    X, y, names = data.split_target(table, "b")
    np.testing.assert_allclose(X, [[1, 3], [4, 6]])
    np.testing.assert_allclose(y, [2, 0.5])
    assert names == ("a", "y")


def test_quoted_cells_and_chosen_columns(tmp_path):
    path = write(tmp_path, 'name,"a, long name",y\n"Smith, J.",1,2\nMiller,3,4\n')
    table = data.read_csv(path, columns=("y", "a, long name"))
    assert table.names == ("y", "a, long name")
    np.testing.assert_allclose(table.values, [[2, 1], [4, 3]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "no data rows"),
        ("1,2\n3,4\n", "has numbers, not names"),
        ("a,\n1,2\n", "column 2 has no name"),
        ("a,a\n1,2\n", "more than one column is called a"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the header has 2"),
        ("a,b\n1,red\n2,blue\n", r"not numeric: b \(for example 'red'\).*--drop b"),
        ("a,b c\n1,red\n2,blue\n", '--drop "b c"'),
        ("a,b\n1,1_000\n", "not numeric"),
        ("a,b\n1,\n2,3\nNA,?\n", "2 of 3 rows have missing values: a in line 4; b in lines 2, 4"),
        ("a,b\n1,inf\n", "b is infinite in line 2"),
        ("a;b\n1,5;2\n2,5;3\n", r"decimal commas: a \(for example '1,5'\).*with a decimal point"),
        (",b\n0,2\n1,3\n", "column 1 has no name.*without the index"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(data.TableError, match=message):
        data.read_csv(write(tmp_path, text))


def test_advice_never_drops_the_target(tmp_path):
    path = write(tmp_path, "a,b\nred,low\nblue,high\n")
    with pytest.raises(
        data.TableError, match=r"b is to be predicted, so it must be numeric: .*--drop a, or"
    ) as caught:
        data.read_csv(path, target="b")
    assert "--drop b" not in str(caught.value)
    with pytest.raises(data.TableError, match="Remove the rows without b") as caught:
        data.read_csv(write(tmp_path, "a,b\n1,\n2,3\n"), target="b")
    assert "--drop" not in str(caught.value)


def test_unknown_columns(tmp_path):
    path = write(tmp_path, "alpha,beta\n1,2\n")
    with pytest.raises(data.TableError, match=r"did you mean 'beta'.*alpha, beta"):
        data.split_target(data.read_csv(path), "Beta")
    with pytest.raises(data.TableError, match="no column 'gamma'"):
        data.read_csv(path, drop=("gamma",))
    with pytest.raises(data.TableError, match="only column"):
        data.split_target(data.read_csv(path, drop=("alpha",)), "beta")
    with pytest.raises(data.TableError, match="no column is left"):
        data.read_csv(path, drop=("alpha", "beta"))
    with pytest.raises(data.TableError, match="there is no file"):
        data.read_csv(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00a\n")
    with pytest.raises(data.TableError, match="UTF-8"):
        data.read_csv(tmp_path / "binary.csv")
