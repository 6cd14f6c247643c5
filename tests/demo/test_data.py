import csv

import pytest

from adapterbank.demo.data import PAIRS, TASKS, draw, load_task, parse_tab

ROWS = [(f"text {i}", "odd" if i % 2 else "even") for i in range(100)]


def test_the_same_seed_draws_the_same_examples():
    drawn = [draw("t", ROWS[:50], ROWS[50:], train=20, test=10, seed=3) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != draw("t", ROWS[:50], ROWS[50:], train=20, test=10, seed=4)


def test_no_text_is_in_both_parts():
    task = draw("t", ROWS, ROWS, train=60, test=100, seed=0)
    assert {text for text, _ in task.train}.isdisjoint(text for text, _ in task.test)
    assert len(task.train) + len(task.test) == len(ROWS)


def test_labels_are_indices_into_the_sorted_names():
    task = draw("t", ROWS[:50], ROWS[50:], train=50, test=50, seed=0)
    assert task.labels == ("even", "odd")
    assert all(label == int(text.split()[1]) % 2 for text, label in task.train + task.test)


def test_copies_and_empty_texts_are_left_out():
    rows = [("a ", "x"), ("a", "x"), (" ", "x"), ("b", "y"), ("c", "")]
    assert sorted(draw("t", rows, [], train=9, test=9, seed=0).train) == [("a", 0), ("b", 1)]


def test_a_label_without_training_examples_is_not_tested():
    task = draw("t", [("a", "x"), ("b", "y")], [("c", "z"), ("d", "y")], train=9, test=9, seed=0)
    assert task.test == [("d", 1)]


def test_majority_is_the_share_of_the_most_frequent_test_label():
    task = draw(
        "t", [("a", "x"), ("b", "y")], [("c", "y"), ("d", "y"), ("e", "x"), ("f", "y")], train=9, test=9, seed=0
    )
    assert task.majority == 0.75


def test_a_long_field_is_read_and_the_limit_of_csv_put_back():
    before = csv.field_size_limit()
    rows = parse_tab("Text\tCategory\nstring\tdiscrete\nmeta\tclass\n" + "x" * 200_000 + "\ta\nonly one field\n")
    assert rows == [{"Text": "x" * 200_000, "Category": "a"}]
    assert csv.field_size_limit() == before


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(KeyError, match="no task 'mnist'; there are autos-motorcycles"):
        load_task("mnist", train=1, test=1)


def test_every_pair_is_a_task():
    assert PAIRS.keys() <= set(TASKS) and len(set(TASKS)) == len(TASKS)
