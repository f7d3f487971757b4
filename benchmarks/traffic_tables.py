"""What ``megatron_lora.py`` found, as tables in the terminal."""

from typing import Any

from tables import Table, printed, spread


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
        printed(Table(f"Collectives of one layer, and MB that a rank sends; {case}", header, lines))
    if record["timings"] == "not measured":
        print("seconds: not measured")
        return
    for case, found in record["timings"].items():
        lines = [
            [name, f"{1e3 * of['median']:.2f}", spread(found["ratios"][f"{name} / base"]) if name != "base" else ""]
            for name, of in found["seconds"].items()
        ]
        title = f"A step of {record['timed_blocks']} blocks on {max(record['ranks'])} ranks; {case}"
        printed(Table(title, ["layout", "ms", "/ base"], lines))


def _kinds(counts: dict[str, int]) -> str:
    short = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS"}
    return " ".join(f"{counts[kind]} {name}" for kind, name in short.items() if kind in counts)
