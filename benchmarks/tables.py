"""Results as tables: in the terminal, or ``python benchmarks/tables.py --markdown`` from ``results.json``."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_name("results.json")
TERMINAL_WIDTH = 150
MIB = 2**20
REFERENCES = ("frozen", "PEFT", "cross_entropy", "base")


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="for a README")
    parser.add_argument("--only", nargs="+", help="items of the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    record = json.loads(options.results.read_text())
    for item in options.only or record:
        results = record[item] if item == "targets" else record[item]["results"]
        for table in of(item, results):
            print(markdown(table) if options.markdown else "", end="\n" if options.markdown else "")
            if not options.markdown:
                printed(table)


def show(item: str, results: Any) -> None:
    """Print one item's results."""
    for table in of(item, results):
        printed(table)


def of(item: str, results: Any) -> list[Table]:
    """Return the tables of one item; one line with the reason where it was not measured."""
    if isinstance(results, dict) and "not_measured" in results:
        return [Table(item, ["not measured"], [[results["not_measured"]]])]
    return list(TABLES.get(item, _timings)(results))


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table.title}\n\n{text}\n"


def printed(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    console = console if console.is_terminal else Console(width=TERMINAL_WIDTH)
    made = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.header):
        made.add_column(column, justify="left" if index == 0 else "right")
    for row in table.rows:
        made.add_row(*map(str, row))
    console.print(made)


def spread(ratio: dict[str, float]) -> str:
    """Return median and interquartile range; a count alone."""
    if ratio["q1"] == ratio["q3"]:
        return f"{ratio['median']:.4g}"
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f}-{ratio['q3']:.3f}]"


def _targets(lines: list[dict[str, Any]]) -> Iterable[Table]:
    rows = []
    for line in lines:
        found = line["measured"]
        measured = f"({line['reason']})" if found is None else spread(found)
        rows.append([line["row"], line["what"], f"{line['target']:g}", measured, line["status"]])
    yield Table("Targets: the worst case of each counts", ["row", "figure", "target", "measured", ""], rows)


def _timings(results: Any) -> Iterable[Table]:
    """Of any results that hold summaries of timings, at any depth: seconds, and ratios to what is compared with."""
    for title, case in _cases("", results):
        references = [one for one in REFERENCES if one in case["seconds"]]
        rows = [
            [name, f"{1e3 * seconds['median']:.2f}"]
            + [spread(ratio) if (ratio := case["ratios"].get(f"{name} / {one}")) else "" for one in references]
            for name, seconds in case["seconds"].items()
        ]
        yield Table(title, ["contender", "ms", *(f"/ {one}" for one in references)], rows)


def _cases(title: str, results: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    if isinstance(results, list):
        for case in results:
            yield from _cases(title, case)
    elif isinstance(results, dict) and "seconds" in results:
        yield ", ".join(part for part in (title, _named(results)) if part), results
    elif isinstance(results, dict):
        for key, case in results.items():
            yield from _cases(f"{key}", case)


def _named(case: dict[str, Any]) -> str:
    """Return what a case is, from its plain entries."""
    plain = (int, float, str)
    return ", ".join(f"{key} {value}" for key, value in case.items() if isinstance(value, plain))


def _counters(results: list[dict[str, Any]]) -> Iterable[Table]:
    for key, title in (
        ("saved_bytes", "Activation bytes kept for backward, one block"),
        ("kernels", "aten kernels of a whole block, forward + backward"),
    ):
        names = list(dict.fromkeys(name for case in results for name in case[key]))
        rows = [
            [case["shape"], case["dtype"], case["dropout"]]
            + [f"{case[key][name]:,}" if name in case[key] else "" for name in names]
            + [f"{case[key]['ours'] / case[key]['PEFT']:.3f}"]
            for case in results
        ]
        yield Table(title, ["block", "base", "dropout", *names, "ours / PEFT"], rows)


def _aten_kernels(results: dict[str, dict[str, int]]) -> Iterable[Table]:
    names = list(next(iter(results.values())))
    rows = [[case, *(counts[name] for name in names)] for case, counts in results.items()]
    yield Table("aten kernels, forward + backward", ["", *names], rows)


def _memory(results: dict[str, Any]) -> Iterable[Table]:
    ours = results["peak_bytes"]["ours"]["peak"]
    rows = [
        [name, f"{found['peak'] / 1e6:,.1f}", f"{found['before'] / 1e6:,.1f}", f"{ours / found['peak']:.3f}"]
        for name, found in results["peak_bytes"].items()
    ]
    title = f"Live storage of a whole step, MB: {results['model']}, batch {results['batch']}"
    yield Table(title, ["contender", "peak", "before the step", "ours / it"], rows)


def _checkpoints(results: dict[str, Any]) -> Iterable[Table]:
    full = results["bytes"]["Lightning, full fine-tuning, with optimizer"]
    rows = [[name, f"{size:,}", f"{100 * size / full:.2f} %"] for name, size in results["bytes"].items()]
    title = f"Checkpoint of {results['model']}, r={results['rank']}"
    yield Table(title, ["file", "bytes", "of full with optimizer"], rows)


def _moe(results: list[dict[str, Any]]) -> Iterable[Table]:
    ratios = ("frozen / full", "PEFT / full", "ours / full", "ours / PEFT")
    rows = [
        [case["case"], case["implementation"], *(spread(case["ratios"][name]) for name in ratios)]
        + [spread(case["with_optimizer"]["ratios"]["ours / full"])]
        + [f"{case['saved_bytes'][name] / MIB:.1f}" for name in ("full", "PEFT", "ours")]
        + [f"{case['saved_bytes']['ours'] / case['saved_bytes']['PEFT']:.3f}"]
        for case in results
    ]
    saved = ["ours / full, with optimizer", "full MiB", "PEFT MiB", "ours MiB", "ours / PEFT saved"]
    yield Table("Experts: a step, and bytes kept for backward", ["case", "experts", *ratios, *saved], rows)


def _ablation(results: list[dict[str, Any]]) -> Iterable[Table]:
    rows = [
        [case["case"], case["dropout"], name, spread(case["ratios"][f"{name} / frozen"])]
        + [f"{case['saved_bytes'][name] / MIB:.1f}", case["kernels"][name], f"{case['moved_bytes'][name] / MIB:.0f}"]
        + [f"{100 * worth[figure]:.1f} %" if worth else "" for figure in ("step", "saved_bytes", "moved_bytes")]
        for case in results
        for name in case["kernels"]
        if name != "frozen"
        for worth in [case["worth"].get(name)]
    ]
    header = ["block", "dropout", "fusions", "step / frozen", "saved MiB", "kernels", "moved MiB"]
    yield Table("Fusions, each alone left out", [*header, "worth: step", "saved", "moved"], rows)


def _compiled(results: dict[str, Any]) -> Iterable[Table]:
    yield from _timings(results)
    columns = ("layers", "graphs", "graphs_after_a_second_step", "compile_cpu_s", "not_measured")
    rows = []
    for name, found in results["compiling"].items():
        ratio = results["ratios"].get(f"{name}, compiled / {name}")
        rows.append([name, *(found.get(column, "") for column in columns), spread(ratio) if ratio else ""])
    yield Table("Compiling equal blocks", ["", *columns, "compiled / eager"], rows)


def _four_bit(results: dict[str, Any]) -> Iterable[Table]:
    yield from _timings(results)
    saved, base = results["saved_bytes"], results["base_bytes"]
    rows = [
        [name, f"{saved[name] / 1e6:,.1f}", f"{saved[name] / saved['PEFT']:.3f}", f"{base[name] / 1e6:,.1f}"]
        for name in saved
    ]
    title = f"Kept for backward, MB: {results['model']}, {results['tokens']} tokens"
    yield Table(title, ["contender", "activations", "/ PEFT", "base"], rows)


def _streaming(results: dict[str, Any]) -> Iterable[Table]:
    figures = ("held", "own_share", "largest_unit")
    rows = [
        [rank, *(f"{found[figure] / 1e6:,.1f}" for figure in figures), f"{found['ratio']:.3f}"]
        for rank, found in enumerate(results["ranks"])
    ]
    title = f"Streaming {results['bytes_on_disk'] / 1e6:,.0f} MB, {results['base']}: MB"
    yield Table(title, ["rank", "held at once", "own share", "largest unit", "held / (own + unit)"], rows)


def _scaling(results: list[dict[str, Any]]) -> Iterable[Table]:
    for curve in dict.fromkeys(case["curve"] for case in results):
        rows = [
            [case["value"], f"{case['theoretical']:.3f}"]
            + [spread(case["ratios"][f"{name} / frozen"]) for name in ("ours", "PEFT", "full", "frozen, fused")]
            for case in results
            if case["curve"] == curve
        ]
        yield Table(
            f"Step / frozen base against {curve}", [curve, "theory", "ours", "PEFT", "full", "frozen, fused"], rows
        )


def _gpu(results: dict[str, Any]) -> Iterable[Table]:
    for part in ("products", "blocks", "whole_step"):
        yield from _timings(results[part])
    longest = results["longest_sequence"]
    yield Table(f"Longest sequence, {results['device']}", list(longest), [list(longest.values())])


TABLES: dict[str, Callable[[Any], Iterable[Table]]] = {
    "targets": _targets,
    "counters": _counters,
    "aten_kernels": _aten_kernels,
    "memory": _memory,
    "checkpoints": _checkpoints,
    "compiled": _compiled,
    "four_bit": _four_bit,
    "streaming": _streaming,
    "scaling": _scaling,
    "gpu": _gpu,
    "moe": _moe,
    "ablation": _ablation,
}


if __name__ == "__main__":
    main()
