"""The checks themselves: bfloat16 in the interpreter, bounds, races, what compilation for Hopper tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from effc.kernels.gpu import check

pytest.importorskip("triton", reason="Triton has builds for Linux only")


def small(mode: str) -> dict[str, Any]:
    """What small.py finds in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if mode == "interpret" else {}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(Path(__file__).parent / "small.py"), mode],
            capture_output=True, text=True, env=environment | {"TRITON_CACHE_DIR": cache}, timeout=300,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_interpreter_rounds_like_a_gpu_and_watches_memory() -> None:
    found = small("interpret")
    same = "add subtract multiply divide larger less negative choose number whole restored undefined"
    assert [name for name in same.split() if found[name] is not True] == []
    assert found["product"] < 1e-5
    assert found["nothing wrong"] == ""
    assert "store out of bounds: 1 of 105 lanes" in found["store past the end of a slice"]
    assert "one at byte -2" in found["load before the beginning"]
    assert "race: program 1 stores what another program stores" in found["two programs store"]
    assert "race: program 1 stores what another program reads" in found["one reads, one stores"]
    assert "two lanes of one store" in found["two lanes store"]
    assert "this process interprets" in found["refusal"]


def test_compilation_for_hopper_needs_no_gpu_and_tells_what_a_kernel_takes() -> None:
    found = small("compile")
    plain, odd = found["plain"], found["odd"]
    assert plain["counts"]["HGMMA"] >= 4
    assert "HMMA" not in plain["counts"]
    assert plain["loop_products"] >= 4
    assert plain["each"] == plain["loop"] * 4 * 32 / 4096
    assert plain["wrong"] == []
    assert plain["barriers"] >= 1
    assert plain["counts"]["LDGSTS"] > 0
    assert "LDGSTS" not in odd["counts"], "a row of 250 numbers is not aligned, so nothing is copied ahead"
    assert found["squeezed"]["registers"] <= 32
    assert "spills" in found["squeezed"]["wrong"][0]
    assert found["fits"]["wrong"] == []
    assert found["untouched"], "nothing runs"
    assert found["loop"] == ["IADD R1", "@P0 BRA 0x10"]
    assert "set TRITON_INTERPRET=1" in found["refusal"]


def test_effc_starts_without_triton() -> None:
    code = (
        "import sys, effc, effc.runtime.cli, effc.kernels.gpu.load, effc.kernels.gpu.check\n"
        "import effc.kernels.quant_linear.gpu\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_text_becomes_a_module_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effc.kernels.gpu import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load.folder.cache_clear()
    load.load.cache_clear()
    try:
        module = load.load('"""A kernel."""\n\nNUMBER = 3\n')
        path = Path(str(module.__file__))
        assert module.NUMBER == 3
        assert path.parent == tmp_path / "effc" / "kernels"
        assert path.parent.stat().st_mode & 0o077 == 0
        path.write_text("NUMBER = 4\n")
        assert load.place('"""A kernel."""\n\nNUMBER = 3\n') == path
        assert "NUMBER = 3" in path.read_text(), "a file that holds other text is written again"
        with pytest.raises(ZeroDivisionError):
            load.load("1 / 0")
        path.parent.chmod(0o777)  # others could put a file there
        load.folder.cache_clear()
        assert load.place("NUMBER = 5\n").parent != path.parent
    finally:
        load.folder.cache_clear()
        load.load.cache_clear()


def test_a_process_that_fails_says_why_and_another_takes_its_place() -> None:
    nothing = {"op": "nothing.gpu", "spec": {}}
    with pytest.raises(TimeoutError, match="no answer in 0 seconds"):
        check.run("interpret", [nothing], seconds=0)
    with pytest.raises(RuntimeError, match=r"No module named 'effc.kernels.nothing'"):
        check.run("interpret", [nothing])
