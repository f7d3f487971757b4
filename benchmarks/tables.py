"""Results as tables in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=None if Console().is_terminal else 130)


def show(item: str, results: Any) -> None:
    """Print one item's results."""
    {"steps": _steps, "counters": _counters, "injection": _injection, "checkpoints": _checkpoints, "moe": _moe}[item](
        results
    )


def spread(ratio: dict[str, float]) -> str:
    """Return median and interquartile range."""
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f}-{ratio['q3']:.3f}]"


def _steps(results: list[dict[str, Any]]) -> None:
    ratios = ("full / frozen", "PEFT / frozen", "ours / frozen", "ours / PEFT", "ours / full")
    rows = [
        [r["shape"], r["tokens"], r["dropout"], f"{1e3 * r['seconds']['frozen']['median']:.1f}"]
        + [spread(r["ratios"][name]) for name in ratios]
        for r in results
    ]
    _print(
        "Step of one block: forward + backward, CPU time, median [IQR]",
        ["block", "T", "dropout", "frozen ms", *ratios],
        rows,
    )


def _counters(results: list[dict[str, Any]]) -> None:
    for key, title in (
        ("saved_bytes", "Activation bytes kept for backward"),
        ("kernels", "aten kernels, forward + backward"),
    ):
        names = list(max((r[key] for r in results), key=len))
        rows = [
            [r["dtype"], r["dropout"]]
            + [f"{r[key][name]:,}" if name in r[key] else "" for name in names]
            + [f"{r[key]['ours'] / r[key]['PEFT']:.3f}"]
            for r in results
        ]
        _print(f"{title}, one {results[0]['shape']} block", ["base", "dropout", *names, "ours / PEFT"], rows)


def _moe(results: list[dict[str, Any]]) -> None:
    ratios = ("frozen / full", "PEFT / full", "ours / full", "ours / PEFT")
    rows = [
        [r["case"], r["implementation"], f"{1e3 * r['seconds']['full']['median']:.1f}"]
        + [spread(r["ratios"][name]) for name in ratios]
        + [f"{r['saved_bytes'][name] / 2**20:.1f}" for name in ("full", "PEFT", "ours")]
        + [f"{r['saved_bytes']['ours'] / r['saved_bytes']['PEFT']:.3f}"]
        for r in results
    ]
    saved = [f"{name} MiB" for name in ("full", "PEFT", "ours")]
    _print(
        "Experts: a step, CPU time, median [IQR], and bytes kept for backward",
        ["case", "experts", "full ms", *ratios, *saved, "ours / PEFT"],
        rows,
    )


def _injection(results: list[dict[str, Any]]) -> None:
    rows = [
        [f"{r['linears']:,}", r["ratios"]["ours / PEFT"]["n"]]
        + [f"{value['median']:.3f}" for value in r["seconds"].values()]
        + [spread(r["ratios"]["ours / PEFT"]), spread(r["ratios"]["ours / PEFT, low_cpu_mem_usage"])]
        for r in results
    ]
    seconds = [f"{name}, s" for name in results[0]["seconds"]]
    _print("Injection, CPU time", ["linears", "rounds", *seconds, "ours / PEFT", "ours / PEFT low_cpu"], rows)


def _checkpoints(results: dict[str, Any]) -> None:
    full = results["bytes"]["Lightning, full fine-tuning, with optimizer"]
    rows = [[name, f"{size:,}", f"{100 * size / full:.2f} %"] for name, size in results["bytes"].items()]
    _print(f"Checkpoint of {results['model']}, r={results['rank']}", ["file", "bytes", "of full with optimizer"], rows)


def _print(title: str, header: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(str, row))
    CONSOLE.print(table)


def show_traffic(record: dict[str, Any]) -> None:
    """Print what ``megatron_lora.py`` found, per layer."""
    table = record["table"]
    print(f"{table['shape']}, {table['ranks']} ranks, {table['dtype']}; counted on {record['device']}")
    for case, rows in table["results"].items():
        lines = [
            [name, *(_kinds(row["collectives"][phase]) for phase in ("forward", "backward", "step"))]
            + [f"{row['sent_bytes'][phase] / 1e6:.2f}" for phase in ("forward", "backward", "step")]
            + [f"{row['extra_bytes'] / 1e6:.2f}", f"{row['extra_percent']:.2f} %"]
            for name, row in rows.items()
        ]
        header = ["layout", "forward", "backward", "step", "forward MB", "backward MB", "step MB", "extra MB", "extra"]
        _print(f"Collectives of one layer, and MB that a rank sends; {case}", header, lines)
    if record["timings"] == "not measured":
        print("seconds: not measured")
        return
    for case, found in record["timings"].items():
        lines = [
            [name, f"{1e3 * of['median']:.2f}", spread(found["ratios"][f"{name} / base"]) if name != "base" else ""]
            for name, of in found["seconds"].items()
        ]
        _print(
            f"A step of {record['timed_blocks']} blocks on {max(record['ranks'])} ranks; {case}",
            ["layout", "ms", "/ base"],
            lines,
        )


def _kinds(counts: dict[str, int]) -> str:
    short = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS"}
    return " ".join(f"{counts[kind]} {name}" for kind, name in short.items() if kind in counts)
