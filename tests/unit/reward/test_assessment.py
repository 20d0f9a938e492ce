"""What the gate reads of a reward model's slices."""

from tetrad.reward.assessment import accuracy_by_length
from tetrad.reward.evaluation import BETTER_IS_LONGER, BETTER_IS_SHORTER, Slice


def part(by: str, value: str, accuracy: float | None) -> Slice:
    high = None if accuracy is None else accuracy + 0.02
    return Slice(by, value, 40, accuracy, None, high, None, 0, None, None, None)


def test_accuracy_where_the_better_answer_is_longer_and_shorter() -> None:
    """A slice of another kind may have the same name; one that is too small has no accuracy."""
    parts = [part("length", BETTER_IS_LONGER, 0.38), part("length", "about equal", 0.6)]
    parts = [part("asked", BETTER_IS_LONGER, 0.9), *parts, part("length", BETTER_IS_SHORTER, None)]
    assert accuracy_by_length(parts, BETTER_IS_LONGER) == (0.38, 0.4)
    assert accuracy_by_length(parts, BETTER_IS_SHORTER) == (None, None) == accuracy_by_length([], BETTER_IS_LONGER)
