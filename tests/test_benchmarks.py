"""The benchmarks run, at sizes that take no time: their JSON, their tables, their plots, what they call met."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# what a development environment can run of them in a few seconds; compiling takes longer, and has tests of its own
ITEMS = ["counters", "aten_kernels", "checkpoints", "memory", "steps", "whole_step", "injection", "decode", "scaling"]
ITEMS += ["moe", "loss", "ablation", "four_bit", "streaming", "gpu"]


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """Scripts of the folder import one another by their bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def quick(on_path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a quick run of all items writes."""
    output = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    threads = torch.get_num_threads()
    importlib.import_module("run").main(["--quick", "--output", str(output), "--only", *ITEMS])
    torch.set_num_threads(threads)
    return output


def results(quick: Path) -> dict[str, Any]:
    return {item: entry["results"] for item, entry in json.loads(quick.read_text()).items() if item in ITEMS}


def test_every_item_is_recorded_with_what_it_depends_on(quick: Path) -> None:
    record = json.loads(quick.read_text())
    assert set(record) == {*ITEMS, "targets"}
    for item in ITEMS:
        entry = record[item]
        assert {"commit", "environment", "quick", "rounds", "load", "uptime_s", "wall_s", "cpu_s", "results"} == set(
            entry
        )
        assert {"torch", "peft", "transformers", "python"} <= set(entry["environment"]["versions"])
        assert entry["environment"]["threads"] == 1


def test_timings_hold_medians_quartiles_and_ratios_of_one_round(quick: Path) -> None:
    for case in results(quick)["steps"]:
        ratio = case["ratios"]["ours / frozen"]
        assert set(ratio) == {"median", "q1", "q3", "n"}
        assert ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert {"frozen", "frozen, fused", "full", "PEFT", "ours"} <= set(case["seconds"])


def test_the_fused_frozen_base_trains_nothing_and_keeps_less_than_lora(on_path) -> None:
    blocks, counters = importlib.import_module("blocks"), importlib.import_module("counters")
    works = blocks.contenders(blocks.TINY, 16, blocks.Adapter(), names=["frozen", "frozen, fused", "ours"])
    assert not any(p.requires_grad for p in works["frozen, fused"].block.parameters())
    grads = {}
    for name in ("frozen", "frozen, fused"):
        works[name].step()
        grads[name] = works[name].x.grad
    torch.testing.assert_close(grads["frozen, fused"], grads["frozen"], rtol=1e-4, atol=1e-4)  # another order of sums
    assert counters.saved_bytes(works["frozen, fused"]) < counters.saved_bytes(works["ours"])


def test_peers_that_are_missing_are_named_with_the_reason(on_path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = importlib.import_module("peers")
    monkeypatch.setitem(peers.MODULES, "LitGPT", ("no-such-package", "no_such_module"))
    peers.status.cache_clear()
    try:
        assert "No module named 'no_such_module'" in peers.status()["LitGPT"]
        assert "LitGPT" not in peers.installed_peers()
        assert peers.status()["Unsloth"].startswith("not measured: ")
    finally:
        peers.status.cache_clear()


def test_an_item_without_its_module_is_a_result(on_path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = importlib.import_module("run")
    entry = run.measured("no_such_item", 2, True)
    assert entry["results"] == {"not_measured": "benchmarks/no_such_item.py is not there"}
    assert importlib.import_module("tables").of("no_such_item", entry["results"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_its_figures_are_not_measured_but_its_code_runs(quick: Path) -> None:
    assert importlib.import_module("gpu").measure(2) == {"not_measured": "there is no CUDA device here"}
    smoke = results(quick)["gpu"]
    assert smoke["longest_sequence"]["ours"] == smoke["longest_sequence"]["limit"]  # all of it fits
    assert all(not case["failed"] for case in smoke["blocks"])
    assert "u, r first" in smoke["products"][0]["seconds"]


def test_products_of_the_gpu_microbenchmark_agree_in_all_orders(on_path) -> None:
    works = importlib.import_module("gpu_products").products(32, 64, 16, 4, "cpu")
    made = {name: work().float() for name, work in works.items()}
    # bfloat16 keeps 8 bits; entries are sums of 32 to 64 products of order 1, rounded once or twice
    close = {"rtol": 3e-2, "atol": 0.5}
    for one, other in (("u", "u"), ("v", "v")):
        torch.testing.assert_close(made[f"{one}, r first"].t(), made[f"{other}, r last"], **close)
    torch.testing.assert_close(made["dA, of v with r first"], made["dA, of v with r last"], **close)
    torch.testing.assert_close(made["dB, r first"].t(), made["dB, r last"], **close)
    orders = ("base, then u B^T added", "u B^T, then base with beta=1", "base + scaled u B^T, three kernels")
    for order in orders[1:]:
        torch.testing.assert_close(made[order], made[orders[0]], rtol=3e-2, atol=1.0)


def test_live_storage_is_the_sum_of_what_is_alive_at_once(on_path) -> None:
    memory = importlib.import_module("memory")
    known = torch.zeros(100)
    with memory.LiveStorage([known]) as live:
        first = known + 1
        second = first + 1  # three at once
        view = second[:10]
        del first
        third = second * 2  # three again, the first one is gone
        second.add_(third)
    live.sweep()
    assert live.peak == 3 * 400
    assert live.now == 3 * 400
    del view


def test_peak_memory_of_ours_is_below_full_fine_tuning(quick: Path) -> None:
    peaks = results(quick)["memory"]["peak_bytes"]
    assert peaks["ours"]["peak"] < peaks["PEFT"]["peak"] < peaks["full"]["peak"]
    assert all(found["before"] < found["peak"] for found in peaks.values())


def test_the_theoretical_line_is_the_formula_of_one_layer_weighted_by_its_work(on_path) -> None:
    scaling = importlib.import_module("scaling")
    shape = importlib.import_module("blocks").QWEN3_06B
    frozen = sum(4 * i * o for i, o in shape.linears())  # FLOPs per token, forward and input gradient
    lora = sum(6 * 8 * (i + o) for i, o in shape.linears())
    assert scaling.theoretical(shape, 8) == pytest.approx(1 + lora / frozen)
    assert scaling.theoretical(shape, 0) == 1


def line(figures: Any, limit: float, *, is_equality: bool = False) -> str:
    targets = importlib.import_module("targets")
    target = targets.Target("1", "x", limit, "item", lambda found: found["figures"], is_equality)
    return targets._line(target, {"item": {"figures": figures}})["status"]


def test_targets_are_judged_by_their_worst_case(on_path) -> None:
    spread = {"median": 1.05, "q1": 0.99, "q3": 1.1, "n": 15}
    assert line([0.4, 0.5], 0.5) == "met"
    assert line([0.4, 0.51], 0.5) == "missed"
    assert line([spread], 1.06) == "met"
    assert line([spread], 1.0) == "missed"
    assert line([spread], 1.0, is_equality=True) == "met"  # 1.0 is inside its own spread
    assert line([{**spread, "q1": 1.01}], 1.0, is_equality=True) == "missed"
    assert line([], 1.0) == "not measured"


def test_every_target_reads_what_its_item_writes(quick: Path) -> None:
    targets = importlib.import_module("targets")
    found = results(quick)
    # sizes of a quick run stand in for those that the targets name
    found["steps"] = [case | {"shape": "Qwen3-0.6B", "tokens": 512} for case in found["steps"]]
    shapes = {"tiny": "Qwen3-0.6B", "tiny Llama": "SmolLM2-135M"}
    found["counters"] = [case | {"shape": shapes[case["shape"]], "dtype": "float32"} for case in found["counters"]]
    found["moe"] = [case | {"case": f"mixture, h={size}"} for case in found["moe"] for size in (256, 512, 1024, 2048)]
    unread = {one["item"] for one in targets.judge(found) if one["status"] == "not measured"}
    assert unread == {"compiled"}


def test_leaving_a_fusion_out_costs_what_it_is_there_for(quick: Path) -> None:
    *blocks, mixture = results(quick)["ablation"]
    for case in blocks:
        assert case["worth"]["without gated MLPs"]["saved_bytes"] > 0.1
        assert case["worth"]["without norms"]["saved_bytes"] > 0.1
        assert case["worth"]["without siblings"]["kernels"] > 0
        assert case["worth"]["none"]["saved_bytes"] > case["worth"]["without gated MLPs"]["saved_bytes"]
    assert mixture["worth"]["without experts"]["saved_bytes"] > 0.1


def test_quick_figures_meet_and_miss_nothing(quick: Path) -> None:
    assert {one["status"] for one in json.loads(quick.read_text())["targets"]} == {"not measured"}


def test_all_results_make_tables_in_markdown(quick: Path) -> None:
    tables = importlib.import_module("tables")
    record = json.loads(quick.read_text())
    for item in (*ITEMS, "targets"):
        made = tables.of(item, record[item] if item == "targets" else record[item]["results"])
        for table in made:
            assert {len(row) for row in table.rows} == {len(table.header)}, table.title
            assert tables.markdown(table).count("\n|") == len(table.rows) + 2


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib, of the benchmarks' environment"
)
def test_plots_are_drawn_of_full_and_of_missing_results(quick: Path, tmp_path: Path) -> None:
    plot = importlib.import_module("plot")
    plot.main(["--results", str(quick), "--output", str(tmp_path)])
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("results.png", "scaling.png"))
    (tmp_path / "empty.json").write_text("{}")
    plot.main(["--results", str(tmp_path / "empty.json"), "--output", str(tmp_path)])


def test_results_in_the_repository_are_those_of_full_sizes() -> None:
    record = json.loads((BENCHMARKS / "results.json").read_text())
    assert not any(entry.get("quick") for item, entry in record.items() if item != "targets")
