"""Whole networks: all convolutions but the first, FWD + BWI + BWW, at the sparsity recorded for each layer.

    python bench/networks.py                                        VGG16, ResNet-34, ResNet-50, Fixup ResNet-50
    python bench/networks.py --networks resnet50 --masked           BWI only where the layer's input is non-zero, and
                                                                    in one call with BWW, as relu_input=True has it
    python bench/networks.py --profile mine.csv --csv out.csv --plot out.png

A profile is a CSV with the columns of bench/recorded_sparsity.csv, one line for each convolution; lines that start with
# are comments. Equal layers at equal sparsities are measured once and multiplied. Times are milliseconds for one image
(measured at N=16, and at N=4 for inputs of 112x112 and above), of the convolutions alone, not of a training step.
The competitors and the environment are those of bench/conv.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import common
from common import BOTH, BWI, BWW_LHS, FWD, Case, Layer, Options, Record
from rich.console import Console
from rich.table import Table

PROFILE = Path(__file__).with_name("recorded_sparsity.csv")
PARTS = {"FWD": (FWD,), "BWI": (BWI,), "BWW": (BWW_LHS,), "BWI + BWW": (BOTH,)}


@dataclasses.dataclass
class Total:
    """Milliseconds for one image summed over a network's layers; `part` is one of PARTS or "all"."""

    network: str
    part: str
    layers: int
    gflop: float
    ours_ms: float
    onednn_ms: float | None
    xla_ms: float | None
    roofline_ms: float | None

    @property
    def x_onednn(self) -> float | None:
        return self.onednn_ms / self.ours_ms if self.onednn_ms else None

    @property
    def x_xla(self) -> float | None:
        return self.xla_ms / self.ours_ms if self.xla_ms else None

    @property
    def roofline_x_onednn(self) -> float | None:
        return self.onednn_ms / self.roofline_ms if self.onednn_ms and self.roofline_ms else None


def read_profile(path: str | Path) -> dict[str, list[tuple[Layer, float, float]]]:
    """Network name -> (layer, sparsity of its input, sparsity of its output gradient) in the file's order.

    Raises:
      ValueError: a column is missing or a sparsity is not in [0, 1], and says which record; or there is none.
    """
    networks: dict[str, list[tuple[Layer, float, float]]] = {}
    with open(path, newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        for index, row in enumerate(rows, start=1):
            try:
                names = ("input_size", "in_features", "features", "kernel", "stride")
                size, in_features, features, kernel, stride = (int(row[name]) for name in names)
                layer = Layer(size, in_features, features, kernel, stride)
                sparsities = float(row["input_sparsity"]), float(row["output_grad_sparsity"])
                layers = networks.setdefault(row["network"], [])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: record {index}: missing or malformed column: {error}") from error
            if not all(0 <= value <= 1 for value in sparsities):
                raise ValueError(f"{path}: record {index}: sparsities {sparsities} are not in [0, 1]")
            layers.append((layer, *sparsities))
    if not networks:
        raise ValueError(f"{path}: no records")
    return networks


def cases_of(layers: list[tuple[Layer, float, float]], masked: bool, grid: float) -> Counter[Case]:
    """The cases of one network and how often each occurs. `grid` > 0 rounds sparsities to its multiples."""

    def rounded(value: float) -> float:
        return min(1.0, round(round(value / grid) * grid, 6)) if grid else value

    counts: Counter[Case] = Counter()
    for layer, of_input, of_gradient in layers:
        lhs, g, batch = rounded(of_input), rounded(of_gradient), layer.batch(None)
        counts[Case(layer, batch, FWD, lhs_sparsity=lhs)] += 1
        if masked:
            counts[Case(layer, batch, BOTH, lhs, g)] += 1
        else:
            counts[Case(layer, batch, BWI, g_sparsity=g)] += 1
            counts[Case(layer, batch, BWW_LHS, lhs, g)] += 1
    return counts


def totals_of(network: str, counts: Counter[Case], records: dict[Case, Record]) -> list[Total]:
    totals = []
    for part, components in (*PARTS.items(), ("all", common.COMPONENTS)):
        chosen = [(records[case], count, case) for case, count in counts.items() if case.component in components]
        if not chosen:
            continue

        def milliseconds(field: str, rows: list[tuple[Record, int, Case]] = chosen) -> float | None:
            values = [(getattr(record, field), count / record.batch) for record, count, _ in rows]
            return None if any(v is None for v, _ in values) else 1e3 * sum(v * weight for v, weight in values)

        peak = next(iter(records.values())).peak_gflops
        work = [(record.gflop * count / record.batch, 1 - record.sparsity) for record, count, _ in chosen]
        ours = milliseconds("ours_s")
        assert ours is not None
        totals.append(
            Total(
                network,
                part,
                sum(count for _, count, _ in chosen),
                sum(gflop for gflop, _ in work),
                ours,
                milliseconds("onednn_s"),
                milliseconds("xla_s"),
                1e3 * sum(gflop * kept for gflop, kept in work) / peak if peak else None,
            )
        )
    return totals


def print_totals(totals: list[Total], first: Record, masked: bool, console: Console) -> None:
    what = "masked by the input's zeros" if masked else "checking the output gradient"
    how = f"{first.isa}, {first.threads} threads, {first.mask} zeros, mode={first.mode}; BWI {what}"
    console.print(f"\nAll convolutions but the first, milliseconds for one image; {how}")
    table = Table()
    headings = ("network", "part", "layers", "ours", "oneDNN", "XLA", "x oneDNN", "x XLA", "roofline x oneDNN")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for total in totals:
        table.add_row(
            total.network,
            total.part,
            str(total.layers),
            common.number(total.ours_ms),
            common.number(total.onednn_ms),
            common.number(total.xla_ms),
            common.colored_ratio(total.x_onednn),
            common.colored_ratio(total.x_xla),
            common.number(total.roofline_x_onednn),
            style="bold" if total.part == "all" else None,
            end_section=total.part == "all",
        )
    console.print(table)


def plot(totals: list[Total], path: str) -> None:
    """Stacked FWD, BWI and BWW times of each competitor, relative to oneDNN's (else ours), a group for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(total.network for total in totals))
    parts = list(dict.fromkeys(total.part for total in totals if total.part != "all"))
    of = {(total.network, total.part): total for total in totals}
    people = [("oneDNN", "onednn_ms"), ("XLA", "xla_ms"), ("ours", "ours_ms"), ("sparse roofline", "roofline_ms")]
    people = [(name, field) for name, field in people if getattr(totals[0], field)]
    figure, axis = plt.subplots(figsize=(2 + 2.4 * len(networks), 4.5))
    width = 0.8 / len(people)
    for row, network in enumerate(networks):
        unit = of[network, "all"].onednn_ms or of[network, "all"].ours_ms
        for column, (name, field) in enumerate(people):
            x, bottom = row + (column - (len(people) - 1) / 2) * width, 0.0
            for index, part in enumerate(parts):
                height = getattr(of[network, part], field) / unit
                axis.bar(
                    x,
                    height,
                    width * 0.9,
                    bottom=bottom,
                    color=f"C{column}",
                    alpha=(1.0, 0.7, 0.45)[index],
                    label=f"{name}: {part}" if row == 0 else None,
                )
                bottom += height
            axis.text(x, bottom, f"{1 / bottom:.2f}x", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(networks)), networks)
    axis.set_ylabel("time, oneDNN = 1")
    axis.set_title("Convolutions but the first, FWD + BWI + BWW, at recorded sparsity; labels: speed", fontsize=9)
    axis.legend(fontsize=7, ncols=len(people), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default=str(PROFILE), metavar="FILE", help="recorded sparsity of each layer")
    parser.add_argument("--networks", help="comma list of networks of the profile; default all")
    parser.add_argument("--masked", action="store_true", help="BWI with relu_input=True")
    parser.add_argument(
        "--grid", type=common.fraction, default=0.0, help="round sparsities to multiples of this: fewer cases"
    )
    common.add_options(parser, budget=0.2)
    parser.add_argument("--csv", type=common.output_file, metavar="FILE", help="totals")
    parser.add_argument("--layers-csv", type=common.output_file, metavar="FILE", help="every measured case")
    arguments = parser.parse_args(argv)
    try:
        profile = read_profile(arguments.profile)
    except (OSError, ValueError) as error:
        parser.error(f"--profile: {error}")
    names = arguments.networks.split(",") if arguments.networks else list(profile)
    for name in names:
        if name not in profile:
            parser.error(f"--networks: {name!r} is not one of {', '.join(profile)}")
    arguments.counts = {name: cases_of(profile[name], arguments.masked, arguments.grid) for name in names}
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    cases = list(dict.fromkeys(case for counts in arguments.counts.values() for case in counts))
    if arguments.child:
        options = Options(arguments.mask, arguments.mode, arguments.threads, arguments.budget)
        common.write_json(arguments.child, [dataclasses.asdict(record) for record in common.measure(cases, options)])
        return
    console = common.console()
    common.limit_threads(__file__, arguments.threads)
    records = [Record(**r) for r in common.run_child(__file__, argv, tuned=True, threads=arguments.threads)]
    by_key = {record.key: record for record in records}
    by_case = {case: by_key[case.key] for case in cases}
    totals = [total for name, counts in arguments.counts.items() for total in totals_of(name, counts, by_case)]
    print_totals(totals, records[0], arguments.masked, console)
    common.print_missing_onednn(console)
    if arguments.csv:
        common.write_csv(arguments.csv, totals)
    if arguments.layers_csv:
        common.write_csv(arguments.layers_csv, records)
    if arguments.plot:
        plot(totals, arguments.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
