"""The comparison of systems and revisions from Git alone, without a data remote."""

import json

import pytest
from answers import a_system, write_run
from support import commit, load_script, run_in

from chest.core.errors import ChestError


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Clone a repository of two commits, in which tuned got better; data/ is in neither."""
    folder = tmp_path_factory.mktemp("origin")
    run_in(folder, "git", "init", "--quiet")
    for wrong in (30, 5):
        write_run(folder, a_system("tuned", wrong=wrong), a_system("other", wrong=30))
        commit(folder)
    run_in(folder, "git", "clone", "--quiet", str(folder), str(folder / "clone"))
    return folder / "clone"


@pytest.fixture
def compared(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)

    def compare(*arguments):
        load_script("tools/compare.py").main([*arguments])
        return capsys.readouterr().out

    return compare


def test_a_planted_difference_is_found_in_a_fresh_clone(compared):
    text = compared("HEAD~1:tuned", "tuned")
    assert "The test split: 480 images of 480 patients" in text
    lines = {line.partition("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["UAR within CT"][3:8] == ["75.0", "%", "95.8", "%", "+20.8"]
    assert {"UAR within X-ray", "UAR", "WAR", "COVID-19 recall", "Tuberculosis recall"} <= {*lines}
    assert "UAR within CT: more than noise: tuned is better than HEAD~1:tuned by 20.8" in text
    assert "only the first is right on\n0, only the second on 100." in text
    assert "One training run: its own noise is not in the interval." in text


def test_the_same_answers_are_no_difference(compared):
    assert "No difference: the same answers to all 480 images." in compared("HEAD:tuned", "tuned")


def test_json_is_for_programs(compared):
    found = json.loads(compared("other", "tuned", "--json", "--split", "all"))
    assert found["uar"]["change"]["value"] == pytest.approx(0.2083, abs=1e-4)
    assert found["beyond_noise"] == {"uar": True, "war": True, "ct": True, "xray": True}
    change = found["within"]["ct"]["change"]
    assert found["half_width"]["ct"] == pytest.approx((change["high"] - change["low"]) / 2)


def test_several_runs_widen_the_interval_and_drop_the_note(compared):
    one = json.loads(compared("other", "HEAD:tuned", "--json"))
    two = json.loads(
        compared("other", "HEAD:tuned", "--runs", "HEAD~1:tuned", "--first-runs", "other", "--json")
    )
    assert two["uar"]["second"] == pytest.approx((0.75 + 0.9583) / 2, abs=1e-4)
    assert two["half_width"]["uar"] > 2 * one["half_width"]["uar"]
    assert (one["note"] != "", two["note"]) == (True, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tuned", "nothing"), "no such answers"),
        (("nowhere:tuned", "tuned"), "nowhere"),
        (("tuned", "other", "--split", "external"), "tuned has no answers for external"),
    ],
)
def test_what_cannot_be_compared_is_named(compared, arguments, message):
    with pytest.raises(ChestError, match=message):
        compared(*arguments)
