import json
from pathlib import Path

import numpy as np
import pytest

from tetrad.cli.doctor import check_vectors, environment
from tetrad.errors import UserError

VECTORS = Path(__file__).parents[2] / "vectors" / "vectors.npz"
GRADIENTS = {
    "sft_loss",
    "policy_loss",
    "value_loss",
    "bt_loss",
    "plackett_luce_loss",
    "crowd_bt_loss",
    "dpo_loss",
    "grpo_loss",
}


def write(path: Path, function: str = "ece", output: float = 0.5, **inputs: object) -> Path:
    """A file with one case; by default one right answer of ece: confidence 0.5, both wrong."""
    inputs = inputs or {"confidence": [0.5, 0.5], "correct": [0.0, 0.0], "bins": 10}
    manifest = [{"name": "c", "fn": function, "inputs": list(inputs), "outputs": ["ece"], "none": []}]
    arrays = {f"c|in|{name}": np.asarray(value) for name, value in inputs.items()}
    np.savez(path, manifest=json.dumps(manifest), **arrays, **{"c|out|ece": np.float64(output)})
    return path


def test_every_known_answer_is_given():
    rows = check_vectors(VECTORS)
    assert sum(row.cases for row in rows) == 646 and len(rows) == 23
    assert [row for row in rows if not row.ok] == []
    assert max(row.error64 for row in rows) <= 1e-12 and max(row.error32 for row in rows) <= 1e-5
    sloped = [row for row in rows if row.grad64 is not None]
    assert {row.function for row in sloped} == GRADIENTS
    assert max(row.grad64 for row in sloped) <= 1e-12 and max(row.grad32 for row in sloped) <= 1e-4
    assert all(row.error32 > 1e-9 for row in rows if row.function != "adaptive_kl")  # float32 was really used


@pytest.mark.parametrize("output", [0.5 + 1e-11, float("nan"), float("inf")])
def test_a_wrong_answer_is_told(tmp_path, output):
    assert check_vectors(write(tmp_path / "right.npz"))[0].ok
    (row,) = check_vectors(write(tmp_path / "wrong.npz", output=output))
    assert not row.ok and row.error64 > 1e-12


def test_a_gradient_is_held_to_the_file(tmp_path):
    chosen, rejected = np.array([0.0]), np.array([0.0])
    for gradient, ok in ((-0.5, True), (-0.5 + 1e-9, False)):
        manifest = [
            {
                "name": "c",
                "fn": "bt_loss",
                "inputs": ["chosen", "rejected"],
                "outputs": ["loss", "grad_chosen"],
                "none": [],
            }
        ]
        arrays = {
            "c|in|chosen": chosen,
            "c|in|rejected": rejected,
            "c|out|loss": np.log(2),
            "c|out|grad_chosen": np.array([gradient]),
        }
        np.savez(tmp_path / "g.npz", manifest=json.dumps(manifest), **arrays)
        (row,) = check_vectors(tmp_path / "g.npz")
        assert row.ok == ok and (row.grad64 > 1e-12) == (not ok)


def test_files_that_are_none_of_ours(tmp_path):
    with pytest.raises(UserError) as caught:
        check_vectors(tmp_path / "missing.npz")
    assert caught.value.code == "E-DATA-PATH"
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(VECTORS.read_bytes()[:5000])
    np.savez(tmp_path / "bare.npz", x=np.ones(3))
    np.save(tmp_path / "array.npz.npy", np.ones(3))
    np.savez(tmp_path / "pickle.npz", manifest=np.array([{"name": "c"}], dtype=object))
    np.savez(tmp_path / "list.npz", manifest=json.dumps([1, 2]))
    np.savez(tmp_path / "none.npz", manifest="[]")
    for name in ("text.npz", "cut.npz", "bare.npz", "array.npz.npy", "pickle.npz", "list.npz", "none.npz"):
        with pytest.raises(UserError) as caught:
            check_vectors(tmp_path / name)
        assert caught.value.code == "E-DATA-FORMAT", name
        assert name in caught.value.where


def test_cases_that_do_not_fit(tmp_path):
    for path in (
        write(tmp_path / "unknown.npz", function="os.system"),
        write(tmp_path / "lacking.npz", confidence=[0.5]),
        write(tmp_path / "outside.npz", confidence=[2.0], correct=[1.0], bins=10),
    ):
        with pytest.raises(UserError) as caught:
            check_vectors(path)
        assert caught.value.code == "E-DATA-FORMAT" and caught.value.where == f"{path}:c"


def test_the_environment_is_said():
    said = dict(environment())
    assert said["torch"][0].isdigit() and "GiB" in said["memory"] and "processors" in said["threads"]
    assert {"tetrad", "python", "numpy", "tokenizers", "safetensors", "attention", "processor"} <= set(said)
    assert all(isinstance(value, str) and value for value in said.values())


@pytest.mark.parametrize(
    ("function", "inputs", "why"),
    [
        ("bt_loss", {"chosen": [1.0], "rejected": [0.0], "temperature": 2.0}, "unknown inputs temperature"),
        ("bt_loss", {"chosen": [1.0], "rejected": [0.0], "label": [0.9], "smoothing": 0.1}, "both set the target"),
        ("bt_loss", {"chosen": np.zeros(0), "rejected": np.zeros(0)}, "no values"),
        ("kwise_loss", {"scores": [1.0, 0.0], "ranks": [1, 1], "ties": "skip"}, "no values"),
        ("score_regression", {"pred": [1.0], "target": [1.0], "lo": 2.0, "hi": 2.0, "kind": "mse"}, "must rise"),
        ("score_regression", {"pred": [], "target": [], "lo": 1.0, "hi": 5.0, "kind": "mse"}, "no values"),
    ],
)
def test_inputs_that_no_function_takes_are_refused(
    tmp_path: Path, function: str, inputs: dict[str, object], why: str
) -> None:
    with pytest.raises(UserError, match=why) as error:
        check_vectors(write(tmp_path / "v.npz", function, **inputs))
    assert error.value.code == "E-DATA-FORMAT"
