"""The one format of answers: what is written is read again, and what does not fit is refused."""

import numpy as np
import pandas as pd
import pytest

from chest import predictions
from chest.errors import InputError

TABLE = pd.DataFrame(
    {
        "image_id": ["a", "b", "c", "d"],
        "label": ["normal", "covid19", "tuberculosis", "normal"],
        "split": ["test", "test", "test", "train"],
    }
)
TEST = TABLE[:3]
RECORD = {"weights": "pretrained", "n": 3}
PROBABILITIES = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions.write("s", predictions.tabulate(TEST, PROBABILITIES), RECORD)
    return predictions.path_of("s")


def test_rows_are_sorted_rounded_and_name_the_most_probable_class():
    table = predictions.tabulate(TEST[::-1], PROBABILITIES[::-1])
    assert tuple(table.columns) == predictions.COLUMNS
    assert list(table["image_id"]) == ["a", "b", "c"]
    assert list(table["actual"]) == ["normal", "covid19", "tuberculosis"]
    assert list(table["predicted"]) == ["normal", "covid19", "covid19"]  # the first of equals
    assert table["covid19"][2] == 0.333333


def test_the_answer_is_that_of_the_rounded_probabilities():
    # Else the file would contradict itself: the second is larger by less than is written.
    near = np.array([[0.4, 0.4000001, 0.1999999]])
    assert predictions.tabulate(TEST[:1], near)["predicted"][0] == "covid19"


def test_unparsed_answers_are_marked():
    table = predictions.tabulate(TEST, [PROBABILITIES[0], None, PROBABILITIES[2]])
    assert list(table["predicted"]) == ["normal", "unparsed", "covid19"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_numbers_are_no_answer(value):
    faulty = PROBABILITIES.copy()
    faulty[1:, 0] = value
    with pytest.raises(InputError, match=r"the answer to b\n.*no finite .*2 of 3 images"):
        predictions.tabulate(TEST, [None, *faulty[1:]])


def test_answers_to_other_splits_than_are_due_are_refused(place):
    assert len(predictions.read("s", TABLE, due=[("train",), ("test",)])) == 3
    with pytest.raises(InputError, match=r"answers of test\n.*val and test, or train"):
        predictions.read("s", TABLE, due=[("val", "test"), ("train",)])


def test_what_was_written_is_read(place):
    assert place.read_text().splitlines()[:2] == [
        "image_id,split,actual,predicted,covid19,normal,tuberculosis",
        "a,test,normal,normal,0.200000,0.700000,0.100000",
    ]
    read = predictions.read("s", TABLE)
    assert read.equals(predictions.tabulate(TEST, PROBABILITIES))
    assert predictions.read_record("s") == RECORD


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("a,test,normal", "b,test,normal", "doubled or not in order"),
        ("a,test,normal", "z,test,normal", "not in order"),
        ("a,test,normal,normal,0.200000,0.700000,0.100000\n", "", "1 images missing"),
        ("c,test", "cc,test", "1 images missing, 1 that do not belong .*c, cc"),
        ("a,test", "a,train", "images missing"),
        ("a,test,normal", "a,test,covid19", "another actual of a"),
        ("normal,normal", "normal,healthy", "the answer 'healthy'"),
        ("normal,normal", "normal,covid19", "not the most probable"),
        ("0.700000", "0.600000", "do not add up"),
        ("0.700000", "nan", "no probabilities"),
        ("0.700000", "1.700000", "no probabilities"),
        ("0.700000", "much", "much"),
        ("predicted", "answer", "columns"),
    ],
)
def test_answers_that_do_not_fit_are_refused(place, old, new, told):
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=told):
        predictions.read("s", TABLE)


def test_an_empty_file_of_answers_is_refused(place):
    place.write_text(place.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match="all images of a split"):
        predictions.read("s", TABLE)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_lost_record_is_named(place, content):
    path = predictions.record_path_of("s")
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=r"s\.json"):
        predictions.read_record("s")
