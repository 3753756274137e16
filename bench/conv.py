"""Times single convolution layers at given sparsities: ours against PyTorch/oneDNN and stock XLA:CPU, in one run.

    python bench/conv.py                                   four layers, FWD, BWI and BWW, s = 0, .5, .7, .9
    python bench/conv.py --shapes vgg16,resnet50 --csv out.csv --plot out.png
    python bench/conv.py --shapes '3x3_56x56_256to256' --batch 4 --sparsity .7
    python bench/conv.py --memory                          peak memory of a call instead of its time

Everything runs through the public JAX API under jit, so packing, scanning for zeros and writing the result are counted.
GF/s are dense-equivalent: the multiplications that were skipped count as done. The sparse roofline is
peak / (1 - sparsity) with the peak of this machine measured in the same run. Ratios are time of the baseline over our
time: above 1 we are faster.

It restarts itself in a tuned environment (see `common.TUNING`) and once more without, for the last columns.
PyTorch is optional (`pip install '.[bench]'`); without it the oneDNN columns stay empty.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
from common import COMPONENT_TITLES, COMPONENTS, Case, Options, Record
from rich.console import Console
from rich.table import Table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", default="quick", help="comma list of tags, groups, names or patterns; 'list' shows them"
    )
    parser.add_argument(
        "--sparsity",
        type=common.comma_list(common.fraction),
        default="0,.5,.7,.9",
        help="comma list of fractions of zeros",
    )
    names = (*COMPONENTS, "bwd_weights", "all")
    parser.add_argument(
        "--components",
        type=common.comma_list(common.one_of(*names)),
        default="fwd,bwd_input,bwd_weights",
        help=f"comma list of {', '.join(names)}; bwd_weights is both of its kinds",
    )
    parser.add_argument(
        "--batch", type=common.positive(int), help="images; default 16, and 4 for inputs of 112x112 and above"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all arrays, baselines' too"
    )
    parser.add_argument(
        "--baselines",
        type=common.comma_list(common.one_of(common.ONEDNN, common.XLA, *common.FORCED), empty=True),
        default="onednn,xla",
        help="comma list of onednn, xla, sparse, dense (the latter: our own forced modes); empty for none",
    )
    parser.add_argument("--no-untuned", action="store_true", help="skip the second pass in an untuned environment")
    parser.add_argument("--csv", type=common.output_file, metavar="FILE")
    parser.add_argument(
        "--markdown", type=common.output_file, metavar="FILE", help="the ratios as a Markdown table, as in the README"
    )
    parser.add_argument("--memory", action="store_true", help="report the peak memory of one call instead of its time")
    common.add_options(parser, budget=0.3)
    parser.add_argument("--untuned-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--memory-of", choices=(common.OURS, common.ONEDNN, common.XLA, *common.FORCED), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    try:
        arguments.cases = [] if arguments.shapes == "list" else build_cases(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def build_cases(arguments: argparse.Namespace) -> list[Case]:
    several = {"bwd_weights": (common.BWW_LHS, common.BWW_G), "all": COMPONENTS}
    names = [component for name in arguments.components for component in several.get(name, (name,))]
    cases = [
        common.sparse_case(layer, layer.batch(arguments.batch), component, sparsity)
        for layer in common.select_layers(arguments.shapes)
        for component in dict.fromkeys(names)
        for sparsity in arguments.sparsity
    ]
    # Without zeros the two ways to check BWW are the same case.
    return list(dict.fromkeys(c for c in cases if not (c.component == common.BWW_G and c.g_sparsity == 0)))


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(
        mask=arguments.mask,
        mode=arguments.mode,
        threads=arguments.threads,
        budget=arguments.budget / (2 if arguments.untuned_child else 1),
        check=not arguments.untuned_child,
        baselines=tuple(arguments.baselines),
        dtype=arguments.dtype,
    )


# --------------------------------------------------------------------------------------------------------------- tables


def print_results(records: list[Record], console: Console) -> None:
    first = records[0]
    peak = common.number(first.peak_gflops, ".0f")
    threads = f"{first.threads} thread{'s'[: first.threads > 1]}"
    console.print(
        f"\n{first.isa}, {threads}, {first.dtype}, {first.mask} zeros, mode={first.mode}; measured peak {peak} GF/s.\n"
        "GF/s dense-equivalent, medians; ratios: time of the other over ours, above 1 we win."
    )
    if first.untuned_gflops is not None:
        console.print(
            "Untuned: default malloc and OpenMP settings; spinning OpenMP threads then slow oneDNN itself, too."
        )
    for component in COMPONENTS:
        chosen = [record for record in records if record.component == component]
        if chosen:
            console.print(component_table(component, chosen))
    console.print(summary_table(records))
    common.print_missing_onednn(console)


def component_table(component: str, records: list[Record]) -> Table:
    def roofline(record: Record) -> str:
        at_all_zero = record.sparsity == 1  # nothing left to multiply: no bound
        return "-" if record.roofline_fraction is None or at_all_zero else f"{record.roofline_fraction:.0%}"

    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("N", lambda r: str(r.batch)),
        ("zeros", lambda r: f"{r.sparsity:.2f}"),
        ("GF/s", lambda r: f"{r.gflops:.0f}"),
        ("of roofline", roofline),
        ("x oneDNN", lambda r: common.colored_ratio(r.x_onednn)),
        ("x XLA", lambda r: common.colored_ratio(r.x_xla)),
        ("x forced", lambda r: common.colored_ratio(r.x_forced)),
        ("XLA by", lambda r: r.xla_kind or "-"),
        ("path", lambda r: r.path),
        ("untuned: GF/s", lambda r: common.number(r.untuned_gflops, ".0f")),
        ("x oneDNN", lambda r: common.number(r.untuned_x_onednn)),
        ("x XLA", lambda r: common.number(r.untuned_x_xla)),
    ]
    columns = [(heading, cell) for heading, cell in columns if any(cell(record) != "-" for record in records)]
    table = Table("layer", title=COMPONENT_TITLES[component], title_justify="left")
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    previous = records[0].layer
    for record in records:
        if record.layer != previous:
            table.add_section()
            previous = record.layer
        table.add_row(record.layer, *(cell(record) for _, cell in columns))
    return table


def summary_table(records: list[Record]) -> Table:
    def worst(rows: list[Record], name: str) -> str:
        return common.number(min((ratio for row in rows if (ratio := getattr(row, name))), default=None))

    def mean(rows: list[Record], name: str) -> float | None:
        return common.geometric_mean(getattr(row, name) for row in rows)

    columns: list[tuple[str, str, Callable[[list[Record], str], str]]] = [
        ("x oneDNN", "x_onednn", lambda rows, name: common.colored_ratio(mean(rows, name))),
        ("worst", "x_onednn", worst),
        ("x XLA", "x_xla", lambda rows, name: common.colored_ratio(mean(rows, name))),
        ("worst", "x_xla", worst),
        ("x forced", "x_forced", lambda rows, name: common.colored_ratio(mean(rows, name))),
        ("worst", "x_forced", worst),
        ("untuned: x oneDNN", "untuned_x_onednn", lambda rows, name: common.number(mean(rows, name))),
        ("x XLA", "untuned_x_xla", lambda rows, name: common.number(mean(rows, name))),
    ]
    columns = [column for column in columns if any(getattr(record, column[1]) is not None for record in records)]
    table = Table("group", "component", title="Geometric means (and the worst layer) by group", title_justify="left")
    for heading in ("zeros", "layers", *(heading for heading, _, _ in columns)):
        table.add_column(heading, justify="right")
    keys = dict.fromkeys((record.group, record.component, record.sparsity) for record in records)
    order = {component: index for index, component in enumerate(COMPONENTS)}
    groups = list(dict.fromkeys(group for group, _, _ in keys))
    previous = None
    for group, component, sparsity in sorted(keys, key=lambda key: (groups.index(key[0]), order[key[1]], key[2])):
        if previous not in (None, (group, component)):
            table.add_section()
        previous = (group, component)
        rows = [r for r in records if (r.group, r.component, r.sparsity) == (group, component, sparsity)]
        cells = [cell(rows, name) for _, name, cell in columns]
        table.add_row(group, component, f"{sparsity:.2f}", str(len(rows)), *cells)
    return table


def markdown(records: list[Record]) -> str:
    """Rows: layer and component. Columns: sparsity, each cell "x oneDNN / x XLA"."""
    sparsities = sorted({record.sparsity for record in records})
    lines = ["| layer | N | component | " + " | ".join(f"{s:.0%} zeros" for s in sparsities) + " |"]
    lines.append("|---|---|---|" + "---|" * len(sparsities))
    of = {(record.layer, record.batch, record.component, record.sparsity): record for record in records}
    for layer, batch, component in dict.fromkeys((r.layer, r.batch, r.component) for r in records):
        cells = []
        for sparsity in sparsities:
            record = of.get((layer, batch, component, sparsity))
            cells.append(f"{common.number(record.x_onednn)} / {common.number(record.x_xla)}" if record else "")
        lines.append(f"| {layer} | {batch} | {component} | " + " | ".join(cells) + " |")
    first = records[0]
    setting = f"{first.isa}, {first.threads} threads, {first.dtype}, {first.mask} zeros"
    lines.append(f"\n{setting}: time of oneDNN / of XLA:CPU over ours.")
    return "\n".join(lines) + "\n"


def plot(records: list[Record], path: str) -> None:
    """Dense-equivalent speed over sparsity, a panel for each group and component, layers thin and their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    groups = list(dict.fromkeys(record.group for record in records))
    components = [name for name in COMPONENTS if any(record.component == name for record in records)]
    figure, axes = plt.subplots(
        len(groups),
        len(components),
        figsize=(4 * len(components), 3 * len(groups)),
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    styles = {"ours": "C0", "oneDNN": "C1", "XLA": "C2"}
    for row, group in enumerate(groups):
        for column, component in enumerate(components):
            axis = axes[row][column]
            chosen = [record for record in records if (record.group, record.component) == (group, component)]
            if component == common.BWW_G:  # its point without zeros is BWW_LHS's
                chosen += [r for r in records if (r.group, r.component, r.sparsity) == (group, common.BWW_LHS, 0.0)]
            speeds: dict[str, dict[float, list[float]]] = {name: {} for name in styles}
            for record in chosen:
                for name, seconds in (("ours", record.ours_s), ("oneDNN", record.onednn_s), ("XLA", record.xla_s)):
                    if seconds:
                        speeds[name].setdefault(record.sparsity, []).append(record.gflop / seconds)
            for layer in dict.fromkeys(record.layer for record in chosen):
                line = sorted((r.sparsity, r.gflops) for r in chosen if r.layer == layer)
                axis.plot(*zip(*line, strict=True), color=styles["ours"], linewidth=0.6, alpha=0.5)
            for name, points in speeds.items():
                if points:
                    at = sorted(points)
                    means = [common.geometric_mean(points[s]) for s in at]
                    axis.plot(at, means, marker="o", markersize=4, linewidth=2, color=styles[name], label=name)
            peak = chosen[0].peak_gflops if chosen else None
            if peak:
                zeros = np.linspace(0, min(0.95, max((r.sparsity for r in chosen), default=0.9)), 50)
                axis.plot(zeros, peak / (1 - zeros), "k--", linewidth=1, label="peak / (1 - s)")
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title(f"{group}: {component}", fontsize=9)
            axis.grid(alpha=0.3, which="both")
            if column == 0:
                axis.set_ylabel("GF/s, dense-equivalent")
            if row == len(groups) - 1:
                axis.set_xlabel("fraction of zeros")
    axes[0][0].legend(fontsize=8)
    first = records[0]
    figure.suptitle(
        f"Convolutions, {first.isa}, {first.threads} threads, {first.mask} zeros (thick: geometric mean of layers)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------- memory


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: --memory needs Linux")


def memory_of(case: Case, who: str, options: Options) -> float | None:
    """MiB by which the first call of `who` raises this process's resident memory at its peak, result included."""
    import jax.numpy as jnp

    arrays = common.Operands(case.layer, case.batch, options).draw(case)
    if who == common.ONEDNN:
        ways = common.torch_competitors(case, arrays)
        if not ways:
            return None
        import torch

        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)
        run = ways[0].run
    else:
        mode = who if who in common.FORCED else options.mode
        compiled = common.compile_jax(case.layer, case.batch, case.component, who, mode, options.dtype)
        on_device = [jnp.asarray(array).block_until_ready() for array in arrays]  # not copied during the call
        run = common.jax_competitor(compiled, who, on_device).run
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again without being seen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def print_memory(arguments: argparse.Namespace, argv: Sequence[str], console: Console) -> None:
    """Each competitor's call in a fresh process of its own; the environment is the untuned one."""
    from rich.progress import track

    people = [common.OURS, *options_of(arguments).baselines]
    columns: dict[str, list[Any]] = {}
    for who in track(people, description="peak memory", transient=True):
        columns[who] = [
            common.run_child(
                __file__,
                [*argv, "--memory-of", who, "--shapes", case.layer.name, "--batch", str(case.batch)]
                + ["--components", case.component, "--sparsity", str(case.skippable)],
                tuned=False,
                threads=arguments.threads,
            )
            for case in arguments.cases
        ]
    table = Table(
        title="Peak memory of one call beyond its operands, MiB (first call, fresh process)", title_justify="left"
    )
    for heading in ("layer", "component"):
        table.add_column(heading)
    for heading in ("N", "zeros", "result itself", *people):
        table.add_column(heading, justify="right")
    for index, case in enumerate(arguments.cases):
        layer = case.layer
        lhs, rhs = case.batch * layer.size**2 * layer.in_features, layer.kernel**2 * layer.in_features * layer.features
        elements = {
            common.FWD: case.batch * layer.out_size**2 * layer.features,
            common.BWI: lhs,
            common.BWI_MASKED: lhs,
            common.BOTH: lhs + rhs,
        }.get(case.component, rhs)
        cells = [common.number(columns[who][index], ".1f") for who in people]
        size = f"{elements * (4 if arguments.dtype == 'float32' else 2) / 2**20:.1f}"
        table.add_row(layer.name, case.component, str(case.batch), f"{case.skippable:.2f}", size, *cells)
    console.print(table)


# ----------------------------------------------------------------------------------------------------------------- main


def list_layers(console: Console) -> None:
    table = Table(title="Layers: kernel (s stride) _ input _ in_features to features", title_justify="left")
    for heading in ("name", "group", "tags"):
        table.add_column(heading)
    for layer in common.LAYERS.values():
        table.add_row(layer.name, layer.group, ", ".join(layer.tags))
    console.print(table)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    console = common.console()
    if arguments.shapes == "list":
        list_layers(console)
        return
    options = options_of(arguments)
    if arguments.child and arguments.memory_of:
        common.write_json(arguments.child, memory_of(arguments.cases[0], arguments.memory_of, options))
        return
    if arguments.child:

        def keep(records: list[Record]) -> None:  # a run that is stopped leaves what it has
            if arguments.csv and not arguments.untuned_child:
                common.write_csv(arguments.csv, records)

        records = common.measure(arguments.cases, options, keep)
        common.write_json(arguments.child, [dataclasses.asdict(r) for r in records])
        return
    common.limit_threads(__file__, arguments.threads)
    if arguments.memory:
        print_memory(arguments, argv, console)
        return
    records = [Record(**r) for r in common.run_child(__file__, argv, tuned=True, threads=arguments.threads)]
    if not arguments.no_untuned:
        console.print("second pass, untuned environment")
        again = common.run_child(__file__, [*argv, "--untuned-child"], tuned=False, threads=arguments.threads)
        common.merge_untuned(records, [Record(**r) for r in again])
    print_results(records, console)
    if arguments.csv:
        common.write_csv(arguments.csv, records)
    if arguments.plot:
        plot(records, arguments.plot)
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(records))


if __name__ == "__main__":
    main(sys.argv[1:])
