"""How figures and verdicts are written."""

from answers import a_system

from chest.evaluation.comparison import ONE_RUN
from chest.reporting.review import compare_parts
from chest.reporting.wording import capitalize, format_interval, format_points, percent, verdicts

POOR, GOOD = ([a_system("a", wrong=wrong).answers] for wrong in (30, 5))


def test_points_have_a_sign_and_shares_a_place():
    shares = (0.015, -0.002, 0.0001, -0.0001)
    assert [format_points(share) for share in shares] == ["+1.5", "-0.2", "0.0", "0.0"]
    assert (percent(0.1234), percent(0.75, 0)) == ("12.3 %", "75 %")
    assert format_interval(0.5, 0.1234, 1) == "50.0 % (12.3 to 100.0)"


def test_a_verdict_names_the_better_system():
    said = verdicts(*compare_parts(POOR, GOOD), ("poor", "good"))
    assert said[0].startswith("UAR within CT: more than noise: good is better than poor by 20.8")
    assert said[-1] == f"{capitalize(ONE_RUN)}."
    same = verdicts(*compare_parts(GOOD, GOOD))
    assert same == ["No difference: the same answers to all 480 images."]
