"""Four published models in plain torch.nn compute the same after `upgrade`, and again after `restore`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from agreement import assert_agree
from torch import nn

import throughtime as tt

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ["tagger", "recogniser", "agent", "decoder"]
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import replaced

    return replaced


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_same_after_upgrade_and_after_restore(
    replaced: ModuleType, name: str, dtype: torch.dtype
) -> None:
    case = replaced.CASES[name]
    model, batch = replaced.prepared(case, dtype, small=True)
    state = copy.deepcopy(model.state_dict())

    def run() -> Any:
        model.load_state_dict(state)  # normalisation counts what it has seen
        return replaced.ran(model, batch)

    before = run()
    recurrent = [module for module in model.modules() if isinstance(module, RECURRENT)]
    assert len(tt.upgrade(model).replaced) == len(recurrent) >= 1
    assert all(type(module).__module__.startswith("throughtime.nn") for module in recurrent)
    after = run()
    assert_agree(after.outputs, before.outputs, f"{name}, outputs")
    assert all(gradient.abs().max() > 0 for gradient in before.gradients.values()), "every parameter counts"
    if dtype == torch.float64:
        assert_agree(after.gradients, before.gradients, f"{name}, gradients")
    else:  # what lies before a normalisation has a gradient of differences, which lose digits in torch too
        exact = replaced.ran(*replaced.prepared(case, torch.float64, small=True)).gradients
        for parameter, gradient in before.gradients.items():
            own = replaced.apart([gradient], [exact[parameter]])
            assert replaced.apart([after.gradients[parameter]], [exact[parameter]]) <= 4 * own + 1e-6, parameter
    assert len(tt.restore(model).replaced) == len(recurrent)
    assert all(type(module).__module__ == "torch.nn.modules.rnn" for module in recurrent)
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(again.outputs, before.outputs, strict=True))
    assert all(torch.equal(again.gradients[key], value) for key, value in before.gradients.items())


def test_the_models_know_nothing_of_throughtime() -> None:
    assert "import throughtime" not in (BENCHMARKS / "replaced_models.py").read_text(encoding="utf-8")


def test_the_benchmark_measures_and_writes_whole_files(
    replaced: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    replaced.main(["--only", "agent", "tagger", "--threads", str(threads), "--quick", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replaced.json", "replaced.md"]
    found = json.loads((tmp_path / "replaced.json").read_text())
    assert [case["name"] for case in found["cases"]] == ["tagger", "agent"]
    for case in found["cases"]:
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in case["seconds"].values())
        assert 0 < case["gradients, float64"] < 1e-10
        assert 0 < case["gradients, float32"] < 1e-4
    text = (tmp_path / "replaced.md").read_text()
    assert "A quick run" in text
    assert text in capsys.readouterr().out


def test_times_as_fast_is_before_over_after(replaced: ModuleType) -> None:
    figures = dict.fromkeys(
        [f"{what}, {kind}" for what in ("outputs", "gradients") for kind in ("float32", "float64")], 0.0
    )
    rounding = {"rounding of outputs": 0.0, "rounding of gradients": 0.0}
    seconds = {"before": [3.0, 2.0, 9.0], "after": [1.0, 1.5, 2.0]}
    case = {"name": "an", "title": "an abacus", "replaced": [], "seconds": seconds, **figures, **rounding}
    setting = {"processor": "wood", "cores": 1, "threads": 1, "system": "wood", "versions": {}, "date": "2000-01-01"}
    text = replaced.as_markdown({"setting": {**setting, "rounds": 3, "quick": False}, "cases": [case]})
    assert "| an abacus | 3000 ms | 1500 ms | 2.00 |" in text
